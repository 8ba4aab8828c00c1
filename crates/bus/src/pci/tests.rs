use std::sync::{Arc, Mutex};

use wardian_irq::{Delivery, Gsi, IrqChip, MsiMessage};

use super::{ConfigError, ConfigSpace, Identity, MappedBar, MsiX};

fn space() -> ConfigSpace {
    let mut space = ConfigSpace::new(&Identity {
        vendor: 0x1af4,
        device: 0x1042,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
        class: 0x01_00_80,
        revision: 1,
    });
    space.add_bar32(1, 0x1000).unwrap();
    space.add_bar64(4, 0x2_0000_0000, true).unwrap();
    space
}

#[test]
fn header_is_where_software_looks() {
    let space = space();
    assert_eq!(space.dword(0x00), 0x1042_1af4);
    assert_eq!(space.dword(0x08), 0x0100_8001);
    assert_eq!(space.dword(0x2c), 0x1100_1af4);
    assert_eq!(space.word(0x0e) & 0x7f00, 0);
    assert_eq!(space.dword(4094), 0xffff_0000, "beyond the end reads as ones");
}

#[test]
fn bars_answer_sizing_by_all_ones() {
    let mut space = space();
    for at in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
        space.write(at, &[0xff; 4]);
    }
    assert_eq!([0x10, 0x18, 0x1c, 0x30].map(|at| space.dword(at)), [0; 4], "no such BARs");
    assert_eq!(space.dword(0x14), 0xffff_f000);
    assert_eq!((space.dword(0x20), space.dword(0x24)), (0xc, 0xffff_fffe));
}

#[test]
fn bars_decode_only_when_enabled_and_set() {
    let mut space = space();
    space.write(0x14, &0xfe00_0123u32.to_le_bytes());
    assert_eq!(space.mapped_bars(), []);
    space.write(0x04, &0xffffu16.to_le_bytes());
    assert_eq!(space.word(4), 0x0546, "reserved and I/O bits stay clear");
    assert_eq!(space.mapped_bars(), [MappedBar { bar: 1, base: 0xfe00_0000, len: 0x1000 }]);
    space.write(0x20, &[0xff; 8]);
    assert_eq!(space.mapped_bars().len(), 1, "one that wraps around does not decode");
    space.write(0x24, &0x10u32.to_le_bytes());
    assert_eq!(space.mapped_bars()[1], MappedBar { bar: 4, base: 0x10_0000_0000, len: 0x2_0000_0000 });
    space.write(0x04, &[0, 0]);
    assert_eq!(space.mapped_bars(), []);
    assert_eq!(space.bar_sizes(), [(1, 0x1000), (4, 0x2_0000_0000)]);
}

#[test]
fn impossible_bars_are_refused() {
    let mut space = space();
    for (bar, len) in [(1, 0x1000), (5, 0x1000), (6, 0x1000), (0, 0x1001), (0, 8), (0, 1 << 32)] {
        assert!(matches!(space.add_bar32(bar, len), Err(ConfigError::Bar { .. })), "{bar} {len:#x}");
    }
    assert!(space.add_bar64(0, 0x1000, false).is_err(), "its upper half is taken");
    assert!(space.add_bar64(5, 0x1000, false).is_err());
}

#[test]
fn capabilities_form_a_list_with_masks() {
    let mut space = space();
    assert_eq!(space.word(6), 0);
    let first = space.add_capability(0x09, &[1, 2, 3], &[0, 0xf0, 0]).unwrap();
    let second = space.add_capability(0x11, &[9; 10], &[]).unwrap();
    assert_eq!((space.word(6), space.word(0x34)), (0x10, first as u16));
    assert_eq!(space.word(first), 0x09 | (second as u16) << 8);
    assert_eq!(space.word(second), 0x11);
    space.write(first, &[0xff; 8]);
    assert_eq!(space.dword(first), 0xf201_0009 | (second as u32) << 8);
    assert!(space.add_capability(0x09, &[0; 0x100], &[]).is_err());
}

#[derive(Default)]
struct Chip(Mutex<Vec<MsiMessage>>);
impl Chip {
    fn take(&self) -> Vec<u32> {
        self.0.lock().unwrap().drain(..).map(|message| message.data).collect()
    }
}
impl IrqChip for Chip {
    fn set_line(&self, _gsi: Gsi, _level: bool) -> Delivery {
        Delivery::Masked
    }
    fn signal_msi(&self, message: MsiMessage) -> Delivery {
        self.0.lock().unwrap().push(message);
        Delivery::Accepted
    }
}

fn msix() -> (Arc<Chip>, MsiX) {
    let chip = Arc::new(Chip::default());
    let msix = MsiX::new(Arc::clone(&chip) as Arc<dyn IrqChip>, 70);
    for vector in 0..70u64 {
        msix.table_write(vector * 16, &0xfee0_1003u64.to_le_bytes());
        msix.table_write(vector * 16 + 8, &(vector as u32 + 100).to_le_bytes());
    }
    (chip, msix)
}

fn pending(msix: &MsiX, word: u64) -> u64 {
    let mut bytes = [0; 8];
    msix.pending_read(word * 8, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn masked_vectors_are_pending_and_sent_on_unmask() {
    let (chip, msix) = msix();
    assert_eq!(msix.signal(3), None, "disabled");
    msix.set_control(0x8000);
    assert_eq!(msix.signal(3), Some(Delivery::Masked));
    assert_eq!(msix.signal(3), Some(Delivery::Masked));
    assert_eq!(msix.signal(69), Some(Delivery::Masked));
    assert_eq!((pending(&msix, 0), pending(&msix, 1)), (1 << 3, 1 << 5));
    msix.table_write(3 * 16 + 12, &[0; 4]);
    assert_eq!(chip.take(), [103], "once, though signalled twice");
    assert_eq!(pending(&msix, 0), 0);
    assert_eq!(msix.signal(3), Some(Delivery::Accepted));
    assert_eq!(chip.0.lock().unwrap()[0], MsiMessage { address: 0xfee0_1000, data: 103 });
    chip.take();

    msix.set_control(0xc000);
    assert_eq!(msix.signal(3), Some(Delivery::Masked), "function mask");
    msix.table_write(69 * 16 + 12, &[0; 4]);
    assert_eq!(chip.take(), [0u32; 0]);
    msix.set_control(0x8000);
    assert_eq!(chip.take(), [103, 169]);
    assert_eq!(msix.signal(70), None, "no such vector");
}

#[test]
fn odd_table_accesses_do_nothing() {
    let (chip, msix) = msix();
    msix.set_control(0x8000);
    msix.table_write(14, &[0; 4]);
    msix.table_write(12, &[0]);
    msix.table_write(70 * 16 + 12, &[0; 4]);
    msix.table_write(u64::MAX - 3, &[0; 4]);
    assert_eq!(msix.signal(0), Some(Delivery::Masked));
    let mut bytes = [1; 8];
    msix.table_read(8, &mut bytes);
    assert_eq!(bytes, [100, 0, 0, 0, 1, 0, 0, 0]);
    msix.table_read(u64::MAX - 3, &mut bytes);
    assert_eq!(bytes, [0; 8]);
    msix.reset();
    assert!(!msix.enabled());
    assert_eq!(chip.take(), [0u32; 0]);
}
