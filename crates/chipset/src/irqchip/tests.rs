use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use wardian_bus::{Access, Bus};
use wardian_irq::{Delivery, Gsi, IrqChip, Kick, LocalInterrupts, MsiMessage};

use super::{IOAPIC_BASE, LAPIC_BASE, MAX_CPUS, MsrFault, SoftIrqChip};
use crate::testing::Clock;

#[derive(Default)]
struct Kicks(AtomicUsize);
impl Kick for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

mod ticks;

struct Board {
    clock: Clock,
    chip: Arc<SoftIrqChip>,
    memory: Bus,
    ports: Bus,
    cpus: Vec<Arc<dyn LocalInterrupts>>,
    kicks: Vec<Arc<Kicks>>,
}

impl Board {
    fn new(cpus: usize) -> Board {
        let clock = Clock::new();
        let chip = SoftIrqChip::new(cpus, &clock.queue);
        let (mut memory, mut ports) = (Bus::new(), Bus::new());
        memory.map(LAPIC_BASE..LAPIC_BASE + 4096, chip.lapic_device()).unwrap();
        memory.map(IOAPIC_BASE..IOAPIC_BASE + 4096, chip.ioapic_device()).unwrap();
        for (range, device) in chip.pic_devices() {
            ports.map(range, device).unwrap();
        }
        let locals: Vec<_> = (0..cpus).map(|cpu| chip.local(cpu).unwrap()).collect();
        let kicks: Vec<_> = locals
            .iter()
            .map(|local| {
                let kicks = Arc::new(Kicks::default());
                local.attach(kicks.clone());
                kicks
            })
            .collect();
        Board { clock, chip, memory, ports, cpus: locals, kicks }
    }

    /// Software-enables every xAPIC, with flat logical IDs, LINT0 masked.
    fn enabled(cpus: usize) -> Board {
        let board = Board::new(cpus);
        for cpu in 0..cpus {
            board.write(cpu, 0xf0, 0x1ff);
            board.write(cpu, 0xd0, 1 << (24 + cpu % 8));
            board.write(cpu, 0x350, 0x1_0700);
        }
        board
    }

    fn read(&self, cpu: usize, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.memory.read(cpu, LAPIC_BASE + offset, &mut data));
        u32::from_le_bytes(data)
    }

    fn write(&self, cpu: usize, offset: u64, value: u32) {
        assert!(self.memory.write(cpu, LAPIC_BASE + offset, &value.to_le_bytes()));
    }

    fn ipi(&self, cpu: usize, dest: u32, low: u32) {
        self.write(cpu, 0x310, dest << 24);
        self.write(cpu, 0x300, low);
    }

    fn entry(&self, pin: u32, value: u64) {
        for (index, word) in [(0x11, (value >> 32) as u32), (0x10, value as u32)] {
            self.memory.write(0, IOAPIC_BASE, &[(index + 2 * pin) as u8]);
            self.memory.write(0, IOAPIC_BASE + 0x10, &word.to_le_bytes());
        }
    }

    fn entry_low(&self, pin: u32) -> u32 {
        self.memory.write(0, IOAPIC_BASE, &[(0x10 + 2 * pin) as u8]);
        let mut data = [0; 4];
        self.memory.read(0, IOAPIC_BASE + 0x10, &mut data);
        u32::from_le_bytes(data)
    }

    fn out(&self, port: u64, value: u8) {
        self.ports.write(0, port, &[value]);
    }

    fn eoi(&self, cpu: usize) {
        self.write(cpu, 0xb0, 0);
    }

    fn taken(&self, cpu: usize) -> Option<u8> {
        self.cpus[cpu].acknowledge()
    }

    /// Who has a deliverable interrupt.
    fn who(&self) -> Vec<usize> {
        (0..self.cpus.len()).filter(|cpu| self.cpus[*cpu].pending().interrupt).collect()
    }

    fn kicks(&self, cpu: usize) -> usize {
        self.kicks[cpu].0.load(Ordering::Relaxed)
    }
}

#[test]
fn each_vcpu_sees_its_own_apic() {
    let board = Board::new(3);
    for cpu in 0..3 {
        assert_eq!(board.read(cpu, 0x20), (cpu as u32) << 24);
        let base = board.chip.msr_read(cpu, 0x1b).unwrap();
        assert_eq!(base, 0xfee0_0800 | if cpu == 0 { 0x100 } else { 0 });
        assert_eq!(board.cpus[cpu].apic_base(), base);
    }
    assert_eq!(board.read(3, 0x20), u32::MAX, "no such vCPU");
    board.write(7, 0xf0, 0x1ff);
    assert!(board.chip.local(3).is_none());
    assert_eq!(board.chip.msr_read(3, 0x1b), Err(MsrFault));
    assert_eq!(board.chip.msr_read(0, 0x7ff), Err(MsrFault));
    let mut byte = [0];
    board.memory.read(1, LAPIC_BASE + 0x23, &mut byte);
    assert_eq!(byte, [1]);
    let mut wide = [0; 8];
    board.memory.read(1, LAPIC_BASE + 0x20, &mut wide);
    assert_eq!(wide, [0, 0, 0, 1, 0, 0, 0, 0]);
    board.memory.write(1, LAPIC_BASE + 0x80, &[0x20]);
    assert_eq!(board.read(1, 0x80), 0, "byte writes are not for registers");
    let tree = board.chip.lapic_device().inspect();
    assert!(tree.iter().any(|(name, value)| name == "cpu2.mode" && value == "XApic"));
    assert_eq!(SoftIrqChip::new(10_000, &Clock::new().queue).cpus(), MAX_CPUS);
}

#[test]
fn shorthands_and_destinations_of_ipis() {
    let board = Board::enabled(4);
    for (dest, low, expected) in [
        (2, 0x4041, vec![2]),
        (0xff, 0x4041, vec![0, 1, 2, 3]),
        (0x0a, 0x4841, vec![1, 3]),
        (0, 0x4_4041, vec![1]),
        (0, 0x8_4041, vec![0, 1, 2, 3]),
        (0, 0xc_4041, vec![0, 2, 3]),
        (9, 0x4041, vec![]),
    ] {
        let before: Vec<_> = (0..4).map(|cpu| board.kicks(cpu)).collect();
        board.ipi(1, dest, low);
        assert_eq!(board.who(), expected, "dest {dest:#x} low {low:#x}");
        for (cpu, before) in before.into_iter().enumerate() {
            assert_eq!(board.kicks(cpu) - before, usize::from(expected.contains(&cpu)));
            if expected.contains(&cpu) {
                assert_eq!(board.taken(cpu), Some(0x41));
                board.eoi(cpu);
            }
        }
    }
    board.ipi(0, 0, 0xc_0400);
    assert!(!board.cpus[0].take_nmi());
    assert!((1..4).all(|cpu| board.cpus[cpu].pending().nmi && board.cpus[cpu].take_nmi()));
}

#[test]
fn lowest_priority_goes_to_the_idlest_and_equals_take_turns() {
    let board = Board::enabled(4);
    board.write(0, 0x80, 0x20);
    board.write(3, 0x80, 0x50);
    let mut got = [0; 4];
    for _ in 0..6 {
        assert_eq!(
            board.chip.signal_msi(MsiMessage { address: 0xfee0_f00c, data: 0x61 }),
            Delivery::Accepted
        );
        let who = board.who();
        assert_eq!(who.len(), 1);
        got[who[0]] += 1;
        board.taken(who[0]);
        board.eoi(who[0]);
    }
    assert_eq!(got, [0, 3, 3, 0]);
    // Busy: an interrupt in service counts as priority.
    board.chip.signal_msi(MsiMessage { address: 0xfee0_1000, data: 0x71 });
    board.taken(1);
    board.chip.signal_msi(MsiMessage { address: 0xfee0_2000, data: 0x71 });
    board.taken(2);
    board.entry(11, 0x0f00_0000_0000_0962);
    assert_eq!(board.chip.set_line(Gsi(11), true), Delivery::Accepted);
    assert_eq!(board.who(), [0]);
    for cpu in 0..4 {
        board.write(cpu, 0xf0, 0xff);
    }
    assert_eq!(board.chip.signal_msi(MsiMessage { address: 0xfee0_f00c, data: 0x61 }), Delivery::Masked);
}

#[test]
fn a_level_line_comes_again_after_eoi_until_it_falls() {
    let board = Board::enabled(2);
    board.entry(9, 0x0100_0000_0000_8039);
    assert_eq!(board.chip.set_line(Gsi(9), true), Delivery::Accepted);
    assert_eq!(board.chip.set_line(Gsi(9), true), Delivery::Coalesced);
    let kicks = board.kicks(1);
    assert_eq!(board.taken(1), Some(0x39));
    assert_eq!(board.taken(1), None);
    assert_ne!(board.entry_low(9) & 1 << 14, 0);
    board.eoi(1);
    assert_eq!(board.kicks(1), kicks + 1);
    assert_eq!(board.taken(1), Some(0x39));
    board.chip.set_line(Gsi(9), false);
    board.eoi(1);
    assert_eq!(board.taken(1), None);
    assert_eq!(board.entry_low(9) & 1 << 14, 0);
    // Masked in its handler (threaded interrupts): nothing until it is unmasked.
    board.chip.set_line(Gsi(9), true);
    board.taken(1);
    board.entry(9, 0x0100_0000_0001_8039);
    board.eoi(1);
    assert_eq!(board.taken(1), None);
    board.entry(9, 0x0100_0000_0000_8039);
    assert_eq!(board.taken(1), Some(0x39));
}

#[test]
fn a_level_line_that_nobody_took_is_tried_again() {
    let board = Board::enabled(1);
    board.write(0, 0xf0, 0xff);
    board.entry(9, 0x8039);
    assert_eq!(board.chip.set_line(Gsi(9), true), Delivery::Masked);
    assert_eq!(board.entry_low(9) & 1 << 14, 0);
    board.write(0, 0xf0, 0x1ff);
    assert_eq!(board.taken(0), Some(0x39));
}

#[test]
fn nested_edges_and_levels_end_in_order() {
    let board = Board::enabled(1);
    board.entry(9, 0x8039);
    board.entry(10, 0x805a);
    board.chip.set_line(Gsi(9), true);
    assert_eq!(board.taken(0), Some(0x39));
    board.chip.set_line(Gsi(10), true);
    assert_eq!(board.taken(0), Some(0x5a));
    board.chip.set_line(Gsi(9), false);
    board.chip.set_line(Gsi(10), false);
    board.eoi(0);
    assert_eq!((board.entry_low(10) & 1 << 14, board.entry_low(9) & 1 << 14), (0, 1 << 14));
    board.eoi(0);
    assert_eq!(board.entry_low(9) & 1 << 14, 0);
    assert_eq!(board.taken(0), None);
}

#[test]
fn linux_wakes_an_application_processor() {
    let board = Board::new(2);
    board.write(0, 0xf0, 0x1ff);
    // wakeup_secondary_cpu_via_init: INIT assert, INIT de-assert, STARTUP twice.
    board.ipi(0, 1, 0xc500);
    assert!(board.cpus[1].pending().init);
    assert_eq!(board.kicks(1), 1);
    assert!(board.cpus[1].take_init());
    board.ipi(0, 1, 0x8500);
    assert!(!board.cpus[1].pending().any(), "de-assert means nothing");
    board.ipi(0, 1, 0x0699);
    assert!(board.cpus[1].pending().startup);
    assert_eq!(board.cpus[1].take_startup(), Some(0x99));
    board.ipi(0, 1, 0x0699);
    assert!(!board.cpus[1].pending().any());
    assert_eq!(board.kicks(1), 2);
    assert!(!board.cpus[0].pending().any());
    board.write(1, 0xf0, 0x1ff);
    board.ipi(0, 1, 0x40fd);
    assert_eq!(board.taken(1), Some(0xfd));
}

#[test]
fn x2apic_clusters_by_msr() {
    let board = Board::new(40);
    for cpu in 0..40 {
        board.chip.msr_write(cpu, 0x1b, board.chip.msr_read(cpu, 0x1b).unwrap() | 1 << 10).unwrap();
        board.chip.msr_write(cpu, 0x80f, 0x1ff).unwrap();
        assert_eq!(board.chip.msr_read(cpu, 0x802), Ok(cpu as u64));
    }
    assert_eq!(board.chip.msr_read(37, 0x80d), Ok(0x2_0020));
    board.chip.msr_write(0, 0x830, 0x0002_0021_0000_0841).unwrap();
    assert_eq!(board.who(), [32, 37]);
    for cpu in [32, 37] {
        assert_eq!(board.taken(cpu), Some(0x41));
        board.chip.msr_write(cpu, 0x80b, 0).unwrap();
    }
    board.chip.msr_write(0, 0x830, 0x26_0000_0042).unwrap();
    assert_eq!(board.who(), [38]);
    board.chip.msr_write(5, 0x83f, 0x43).unwrap();
    assert_eq!(board.who(), [5, 38]);
    board.chip.msr_write(0, 0x830, u64::from(u32::MAX) << 32 | 0x44).unwrap();
    assert_eq!(board.who().len(), 40);
    assert_eq!(board.read(0, 0x20), u32::MAX, "no page in x2APIC mode");
    assert_eq!(board.chip.msr_write(0, 0x830, 1 << 16), Err(MsrFault));
    // The IOAPIC still reaches IDs below 255, and EOI of a level interrupt by MSR goes back to it.
    board.entry(9, 0x2700_0000_0000_8099);
    board.chip.set_line(Gsi(9), true);
    assert_eq!(board.taken(39), Some(0x99));
    board.chip.msr_write(39, 0x80b, 0).unwrap();
    assert_eq!(board.taken(39), Some(0x99));
}

#[test]
fn deadline_by_msr() {
    let board = Board::enabled(2);
    board.write(1, 0x320, 0x4_00ec);
    board.chip.msr_write(1, 0x6e0, 1000).unwrap();
    assert_eq!(board.chip.msr_read(1, 0x6e0), Ok(1000));
    board.clock.run(wardian_time::Nanos(1000));
    assert!(board.chip.local(1).unwrap().pending().interrupt);
    assert_eq!(board.chip.msr_read(1, 0x6e0), Ok(0));
    assert_eq!((board.who(), board.taken(1)), (vec![1], Some(0xec)));
    board.chip.msr_write(1, 0x6e0, 5000).unwrap();
    board.chip.set_tsc_adjust(1, 10_000);
    assert_eq!(board.who(), [] as [usize; 0], "same class is in service");
    board.eoi(1);
    assert_eq!(board.taken(1), Some(0xec));
}

/// Remaps the pair as Linux does and opens IRQ 0.
fn pic_init(board: &Board) {
    for (port, value) in [
        (0x21, 0xff),
        (0x20, 0x11),
        (0x21, 0x30),
        (0x21, 0x04),
        (0x21, 0x01),
        (0xa0, 0x11),
        (0xa1, 0x38),
        (0xa1, 0x02),
        (0xa1, 0x01),
        (0x21, 0xfa),
        (0xa1, 0xfe),
    ] {
        board.out(port, value);
    }
}

#[test]
fn the_8259_pair_reaches_vcpu_0_through_lint0() {
    let board = Board::new(2);
    pic_init(&board);
    assert_eq!(board.chip.set_line(Gsi(0), true), Delivery::Accepted);
    assert_eq!((board.who(), board.kicks(0)), (vec![0], 1));
    assert_eq!(board.taken(0), Some(0x30));
    assert_eq!(board.who(), [] as [usize; 0]);
    board.out(0x20, 0x20);
    board.chip.set_line(Gsi(8), true);
    assert_eq!(board.taken(0), Some(0x38));
    board.out(0xa0, 0x20);
    board.out(0x20, 0x20);
    assert_eq!(board.taken(0), None);
    board.chip.set_line(Gsi(0), false);
    board.chip.set_line(Gsi(0), true);
    board.out(0x21, 0xff);
    assert!(!board.cpus[0].pending().any(), "masked before it was taken");
    board.out(0x21, 0xfa);
    let mut byte = [0];
    board.out(0x20, 0x0c);
    board.ports.read(0, 0x20, &mut byte);
    assert_eq!(byte, [0x80]);
    assert!(!board.cpus[0].pending().any(), "taken by a poll");
    // With LINT0 masked nothing comes, as when Linux switches to the IOAPIC.
    board.out(0x20, 0x20);
    board.write(0, 0xf0, 0x1ff);
    board.write(0, 0x350, 0x1_0700);
    board.chip.set_line(Gsi(0), false);
    board.chip.set_line(Gsi(0), true);
    assert!(!board.cpus[0].pending().any());
}

#[test]
fn the_system_timer_is_input_2_of_the_ioapic() {
    let board = Board::enabled(1);
    board.entry(0, 0x50);
    board.entry(2, 0x30);
    for gsi in [Gsi(0), Gsi(2)] {
        assert_eq!(board.chip.set_line(gsi, true), Delivery::Accepted);
        board.chip.set_line(gsi, false);
        assert_eq!(board.taken(0), Some(0x30));
        board.eoi(0);
        assert_eq!(board.taken(0), None);
    }
    assert_eq!(board.chip.set_line(Gsi(24), true), Delivery::Masked);
    assert_eq!(board.chip.set_line(Gsi(u32::MAX), true), Delivery::Masked);
    board.entry(23, 0x77);
    board.chip.set_line(Gsi(23), true);
    assert_eq!(board.taken(0), Some(0x77));
}

#[test]
fn nothing_a_guest_writes_breaks_anything() {
    // A deterministic walk over every register of every device, with odd sizes and values.
    let board = Board::new(3);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..200_000 {
        let (what, value) = (random(), random());
        let cpu = (what >> 8) as usize % 4;
        let data = value.to_le_bytes();
        let data = &data[..1 << (what >> 16 & 3)];
        let offset = what >> 20 & 0xfff;
        match what % 8 {
            0 => drop(board.memory.write(cpu, LAPIC_BASE + (offset & !0xf), data)),
            1 => drop(board.memory.read(cpu, LAPIC_BASE + offset, &mut [0; 4])),
            2 => drop(board.memory.write(cpu, IOAPIC_BASE + (offset & 0x50), data)),
            3 => drop(board.ports.write(cpu, [0x20, 0x21, 0xa0, 0xa1, 0x4d0][offset as usize % 5], data)),
            4 => drop(board.chip.msr_write(cpu, 0x800 + (offset as u32 & 0x3f), value & value >> 32)),
            5 => drop(board.chip.msr_write(cpu, 0x1b, 0xfee0_0000 | value & 0xd00)),
            6 => {
                board.chip.set_line(Gsi(value as u32 % 26), value & 64 != 0);
                board.chip.signal_msi(MsiMessage { address: 0xfee0_0000 | value >> 44, data: value as u32 });
                let _ = board.chip.msr_write(cpu, 0x6e0, value >> (what >> 40 & 63));
            }
            _ => {
                if let Some(local) = board.cpus.get(cpu) {
                    local.pending();
                    local.acknowledge();
                    local.set_cr8(value as u8 & 15);
                    if value & 0xf00 == 0 {
                        local.take_init();
                    }
                    local.take_startup();
                    local.take_nmi();
                }
                board.clock.run(wardian_time::Nanos(value & 0xffff));
            }
        }
    }
    for cpu in 0..3 {
        assert_eq!(board.cpus[cpu].apic_base() & 0xff, 0);
    }
    let access = Access { offset: 0, vcpu: 0 };
    let mut data = [0; 4];
    board.chip.ioapic_device().read(access, &mut data);
    assert_eq!(data[1..], [0, 0, 0]);
}

/// Devices raise lines while vCPUs end interrupts: no deadlock, nothing lost.
#[test]
fn threads_raise_and_end_level_interrupts() {
    let board = Board::enabled(2);
    board.entry(16, 0x0000_0000_0000_8061);
    board.entry(17, 0x0100_0000_0000_8062);
    std::thread::scope(|scope| {
        for (cpu, gsi, vector) in [(0usize, Gsi(16), 0x61), (1, Gsi(17), 0x62)] {
            let board = &board;
            let level = Arc::new(AtomicUsize::new(0));
            let raised = Arc::clone(&level);
            scope.spawn(move || {
                for _ in 0..2000 {
                    raised.store(1, Ordering::SeqCst);
                    board.chip.set_line(gsi, true);
                    while raised.load(Ordering::SeqCst) == 1 {
                        std::thread::yield_now();
                    }
                }
            });
            scope.spawn(move || {
                let mut served = 0;
                while served < 2000 {
                    let Some(got) = board.taken(cpu) else {
                        std::thread::yield_now();
                        continue;
                    };
                    assert_eq!(got, vector);
                    if level.load(Ordering::SeqCst) == 1 {
                        board.chip.set_line(gsi, false);
                        served += 1;
                        level.store(0, Ordering::SeqCst);
                    }
                    board.eoi(cpu);
                }
            });
        }
    });
}
