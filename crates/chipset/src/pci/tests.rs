use std::sync::{Arc, Mutex};

use super::{IntxLines, PciError, PciRoot, intx_gsi};
use crate::layout;
use crate::power::PowerRequest;
use crate::power::tests::Requests;
use crate::wire::lock;
use crate::wire::tests::Recorder;
use wardian_bus::Bus;
use wardian_bus::pci::{ConfigSpace, Function, Identity, MappedBar};
use wardian_irq::IrqChip;

/// A function that remembers what is written to its BARs and reads as its BAR number.
pub(super) struct Probe {
    config: Mutex<ConfigSpace>,
    written: Mutex<Vec<(usize, u64, Vec<u8>)>>,
}

impl Probe {
    pub(super) fn new(bar32: u64, bar64: u64) -> Arc<Probe> {
        let identity = Identity { vendor: 0x1af4, device: 0x1042, class: 0x01_80_00, ..Identity::default() };
        let mut config = ConfigSpace::new(&identity);
        if bar32 != 0 {
            config.add_bar32(0, bar32).unwrap();
        }
        if bar64 != 0 {
            config.add_bar64(4, bar64, true).unwrap();
        }
        config.set(0x3d, &[1]);
        Arc::new(Probe { config: Mutex::new(config), written: Mutex::default() })
    }
}

impl Function for Probe {
    fn name(&self) -> &str {
        "probe"
    }
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        assert!(offset + data.len() <= 4096 && offset.is_multiple_of(data.len()) && data.len() <= 4);
        lock(&self.config).read(offset, data);
    }
    fn config_write(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= 4096 && offset.is_multiple_of(data.len()) && data.len() <= 4);
        lock(&self.config).write(offset, data);
    }
    fn mapped_bars(&self) -> Vec<MappedBar> {
        lock(&self.config).mapped_bars()
    }
    fn bar_sizes(&self) -> Vec<(usize, u64)> {
        lock(&self.config).bar_sizes()
    }
    fn bar_read(&self, bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(bar as u8);
    }
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]) {
        lock(&self.written).push((bar, offset, data.to_vec()));
    }
}

struct Rig {
    root: Arc<PciRoot>,
    ports: Bus,
    memory: Bus,
    power: Arc<Requests>,
}

impl Rig {
    fn new(functions: &[Arc<Probe>]) -> Rig {
        let root = PciRoot::new();
        for function in functions {
            root.add(Arc::clone(function) as _).unwrap();
        }
        let power = Arc::new(Requests::default());
        let (mut ports, mut memory) = (Bus::new(), Bus::new());
        let (range, device) = root.ports(Arc::clone(&power) as _);
        ports.map(range, device).unwrap();
        for (range, device) in root.memory() {
            memory.map(range, device).unwrap();
        }
        Rig { root, ports, memory, power }
    }

    fn select(&self, device: u32, register: u32) {
        self.ports.write(0, 0xcf8, &(1 << 31 | device << 11 | register & 0xfc).to_le_bytes());
    }

    fn get(&self, device: u32, register: u32) -> u32 {
        self.select(device, register);
        let mut data = [0; 4];
        self.ports.read(0, 0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    fn put(&self, device: u32, register: u32, value: u32) {
        self.select(device, register);
        self.ports.write(0, 0xcfc, &value.to_le_bytes());
    }

    fn memory<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut data = [0; N];
        self.memory.read(0, address, &mut data);
        data
    }

    fn ecam(&self, device: u64, register: u64) -> u64 {
        layout::PCI_ECAM.start + (device << 15) + register
    }

    fn bar_address(&self, device: u32, register: u32) -> u64 {
        let low = self.get(device, register);
        let high = if low & 0b110 == 0b100 { self.get(device, register + 4) } else { 0 };
        u64::from(high) << 32 | u64::from(low & !0xf)
    }
}

#[test]
fn a_guest_finds_what_is_there() {
    let rig = Rig::new(&[Probe::new(0x1000, 0x4000), Probe::new(0, 0x4000)]);
    let found: Vec<(u32, u32)> =
        (0..32).map(|device| (device, rig.get(device, 0))).filter(|(_, id)| *id != u32::MAX).collect();
    assert_eq!(found, [(0, 0x0008_1b36), (1, 0x1042_1af4), (2, 0x1042_1af4)]);
    assert_eq!(rig.get(0, 8) >> 8, 0x06_00_00);
    // Nothing on another bus or function, nor without the enable bit.
    for address in [1u32 << 31 | 1 << 16 | 1 << 11, 1 << 31 | 1 << 11 | 1 << 8, 1 << 11] {
        rig.ports.write(0, 0xcf8, &address.to_le_bytes());
        let mut data = [0; 4];
        rig.ports.read(0, 0xcfc, &mut data);
        assert_eq!(data, [0xff; 4], "{address:#x}");
        rig.ports.write(0, 0xcfc, &[0; 4]);
    }
    // Sizes, as every guest takes them.
    rig.put(1, 0x10, u32::MAX);
    assert_eq!(rig.get(1, 0x10), 0xffff_f000);
    rig.put(1, 0x20, u32::MAX);
    rig.put(1, 0x24, u32::MAX);
    assert_eq!((rig.get(1, 0x20), rig.get(1, 0x24)), (0xffff_c00c, u32::MAX));
}

#[test]
fn narrow_accesses_and_ecam_agree() {
    let rig = Rig::new(&[Probe::new(0x1000, 0)]);
    rig.select(1, 0);
    let mut word = [0; 2];
    rig.ports.read(0, 0xcfe, &mut word);
    assert_eq!(u16::from_le_bytes(word), 0x1042);
    let mut byte = [0];
    rig.ports.read(0, 0xcfd, &mut byte);
    assert_eq!(byte, [0x1a]);
    let mut crossing = [0; 4];
    rig.ports.read(0, 0xcfe, &mut crossing);
    assert_eq!(crossing, [0xff; 4]);
    rig.ports.write(0, 0xcfe, &[0; 4]);
    rig.select(1, 0x3c);
    rig.ports.write(0, 0xcfc, &[0x5a]);
    assert_eq!(rig.memory(rig.ecam(1, 0x3c)), [0x5a, 1]);
    assert_eq!(rig.memory::<8>(rig.ecam(1, 0)), [0xf4, 0x1a, 0x42, 0x10, 0, 0, 0, 0]);
    assert_eq!(rig.memory::<4>(rig.ecam(1, 1)), [0x1a, 0x42, 0x10, 0]); // misaligned: byte by byte
    rig.memory.write(0, rig.ecam(1, 0x3c), &[0x77]);
    assert_eq!(rig.get(1, 0x3c) as u8, 0x77);
    assert_eq!(rig.memory::<4>(rig.ecam(3, 0)), [0xff; 4]);
    assert_eq!(rig.memory::<4>(rig.ecam(1 << 5, 0)), [0xff; 4]);
    assert_eq!(rig.memory::<8>(rig.ecam(1, 0xffe)), [0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    let mut address = [0; 4];
    rig.ports.write(0, 0xcf8, &0xffff_ffffu32.to_le_bytes());
    rig.ports.read(0, 0xcf8, &mut address);
    assert_eq!(u32::from_le_bytes(address), 0x80ff_fffc);
}

#[test]
fn assigned_bars_lie_in_their_windows_and_answer() {
    let probes = [Probe::new(0x1000, 0x4000), Probe::new(0x10_0000, 0x4000_0000), Probe::new(0, 0x4000)];
    let rig = Rig::new(&probes);
    rig.root.assign().unwrap();
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for (device, narrow, wide) in [(1, 0x1000, 0x4000), (2, 0x10_0000, 0x4000_0000), (3, 0, 0x4000)] {
        for (register, len, window, bar) in
            [(0x10, narrow, layout::PCI_MMIO32, 0u8), (0x20, wide, layout::PCI_MMIO64, 4)]
        {
            if len == 0 {
                continue;
            }
            let base = rig.bar_address(device, register);
            assert!(base.is_multiple_of(len) && window.contains(&base) && base + len <= window.end);
            assert_eq!(rig.memory::<4>(base + 8), [bar; 4]);
            assert_eq!(rig.memory::<4>(base + len - 4), [bar; 4]);
            assert_eq!(rig.memory::<8>(base + len - 4), [0xff; 8]);
            taken.push((base, base + len));
        }
        assert_eq!(rig.get(device, 0x3c) as u8, intx_gsi(device as u8, 1).0 as u8);
    }
    taken.sort_unstable();
    assert!(taken.is_sorted_by(|a, b| a.1 <= b.0));
    let base = rig.bar_address(3, 0x20);
    rig.memory.write(0, base + 0x3000, &[1, 0]);
    assert_eq!(*lock(&probes[2].written), [(4, 0x3000, vec![1, 0])]);
    assert_eq!(rig.memory::<4>(layout::PCI_MMIO64.end - 4), [0xff; 4]);
}

#[test]
fn the_guest_moves_and_masks_bars() {
    let rig = Rig::new(&[Probe::new(0x1000, 0)]);
    rig.root.assign().unwrap();
    let base = rig.bar_address(1, 0x10);
    let command = rig.get(1, 4);
    rig.put(1, 4, command & !2);
    assert_eq!(rig.memory::<1>(base), [0xff]);
    rig.put(1, 0x10, 0xd000_0000);
    rig.put(1, 4, command);
    assert_eq!((rig.memory::<1>(base), rig.memory::<1>(0xd000_0000)), ([0xff], [0]));
    // By ECAM, with decoding on.
    rig.memory.write(0, rig.ecam(1, 0x10), &0xd800_0000u32.to_le_bytes());
    assert_eq!((rig.memory::<1>(0xd000_0000), rig.memory::<1>(0xd800_0fff)), ([0xff], [0]));
    // Outside of every window it answers nowhere.
    rig.put(1, 0x10, 0x1000_0000);
    assert_eq!(rig.memory::<1>(0xd800_0000), [0xff]);
    // On top of another one, somebody answers and nothing breaks.
    let other = Rig::new(&[Probe::new(0x1000, 0), Probe::new(0x2000, 0)]);
    for device in [1, 2] {
        other.put(device, 0x10, 0xd000_0000);
        other.put(device, 4, 2);
    }
    assert_eq!(other.memory::<1>(0xd000_0000), [0]);
}

#[test]
fn full_windows_and_a_full_bus_are_errors() {
    let rig = Rig::new(&[Probe::new(0x2000_0000, 0), Probe::new(0x1000, 0)]);
    assert_eq!(
        rig.root.assign(),
        Err(PciError::WindowFull { name: "probe".into(), bar: 0, len: 0x1000, window: 32 })
    );
    let root = PciRoot::new();
    for number in 1..32 {
        assert_eq!(root.add(Probe::new(0, 0)), Ok(number));
    }
    assert_eq!(root.add(Probe::new(0, 0)), Err(PciError::BusFull { name: "probe".into() }));
}

#[test]
fn reset_control_at_cf9() {
    let rig = Rig::new(&[]);
    rig.ports.write(0, 0xcf9, &[0x02]);
    assert!(rig.power.take().is_empty());
    rig.ports.write(0, 0xcf9, &[0x06]);
    rig.ports.write(0, 0xcf9, &[0x0e]);
    assert_eq!(rig.power.take(), [PowerRequest::Reset]);
    let mut byte = [0];
    rig.ports.read(0, 0xcf9, &mut byte);
    assert_eq!(byte, [0x0e]);
}

#[test]
fn a_shared_input_is_up_while_anybody_holds_it() {
    let chip = Recorder::new();
    let lines = IntxLines::new(Arc::clone(&chip) as Arc<dyn IrqChip>);
    let (a, b, other) = (lines.line(1, 1), lines.line(5, 1), lines.line(2, 1));
    assert_eq!(a.gsi(), b.gsi());
    assert_ne!(a.gsi(), other.gsi());
    assert_eq!(intx_gsi(1, 2), other.gsi());
    a.set(true);
    b.set(true);
    a.set(false);
    assert!(chip.level(a.gsi()) && !chip.level(other.gsi()));
    b.set(false);
    b.set(false);
    assert!(!chip.level(a.gsi()));
    assert_eq!(chip.edges(a.gsi()), 1);
}
