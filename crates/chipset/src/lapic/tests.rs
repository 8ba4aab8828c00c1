use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use wardian_irq::{Delivery, Kick, MsiMessage};
use wardian_time::{Nanos, TickConfig, TimeBase};

use super::message::{Ipi, Message, Mode, Shorthand};
use super::regs::{Effect, reg};
use super::{Lapic, MsrFault};
use crate::testing::Clock;

#[derive(Default)]
struct Kicks(AtomicUsize);
impl Kick for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct One {
    clock: Clock,
    lapic: Arc<Lapic>,
    kicks: Arc<Kicks>,
    pin: Arc<AtomicBool>,
}

impl One {
    /// A software-enabled xAPIC with this ID.
    fn new(id: u32) -> One {
        let clock = Clock::new();
        let pin = Arc::new(AtomicBool::new(false));
        let lapic = Lapic::new(id, &clock.queue, Arc::clone(&pin), TickConfig::default());
        let kicks = Arc::new(Kicks::default());
        lapic.attach(kicks.clone());
        assert_eq!(lapic.page_write(reg::SVR, 0x1ff), Some(Effect::Enabled));
        One { clock, lapic, kicks, pin }
    }

    fn x2apic(id: u32) -> One {
        let one = One::new(id);
        one.lapic.set_apic_base(one.lapic.apic_base() | 1 << 10).unwrap();
        one
    }

    fn base(&self) -> &TimeBase {
        &self.clock.base
    }

    fn kicks(&self) -> usize {
        self.kicks.0.load(Ordering::Relaxed)
    }

    fn fixed(&self, vector: u8) -> Delivery {
        self.lapic.accept(&message(vector, false))
    }

    fn read(&self, register: u8) -> u32 {
        self.lapic.page_read(register).unwrap()
    }

    fn write(&self, register: u8, value: u32) -> Option<Effect> {
        self.lapic.page_write(register, value)
    }

    fn taken(&self) -> Option<u8> {
        let _ = self.lapic.pending(); // as an engine does first
        self.lapic.acknowledge().unwrap()
    }

    /// Takes and ends every interrupt there is.
    fn drain(&self) -> Vec<u8> {
        let mut vectors = Vec::new();
        while let Some(vector) = self.taken() {
            self.write(reg::EOI, 0);
            vectors.push(vector);
        }
        vectors
    }
}

fn message(vector: u8, level: bool) -> Message {
    Message { dest: 0, wide: false, logical: false, mode: Mode::Fixed, vector, level }
}

fn signal(mode: Mode, vector: u8) -> Message {
    Message { mode, ..message(vector, false) }
}

#[test]
fn priorities_nest_and_eois_unwind() {
    let one = One::new(0);
    assert_eq!(one.fixed(0x31), Delivery::Accepted);
    assert_eq!(one.fixed(0x31), Delivery::Coalesced);
    assert_eq!(one.kicks(), 1);
    assert!(one.lapic.pending().interrupt);
    assert_eq!(one.taken(), Some(0x31));
    assert_eq!(one.read(reg::PPR), 0x30);
    one.fixed(0x3f); // same class: waits
    assert!(!one.lapic.pending().interrupt);
    assert_eq!(one.taken(), None);
    one.fixed(0x52);
    assert_eq!(one.kicks(), 2);
    assert_eq!(one.taken(), Some(0x52));
    assert_eq!(one.read(reg::ISR + 1) | one.read(reg::ISR + 2), 1 << 0x11 | 1 << 0x12);
    assert_eq!(one.write(reg::EOI, 0), None);
    assert_eq!(one.read(reg::PPR), 0x30);
    assert_eq!(one.taken(), None);
    one.write(reg::EOI, 0);
    assert_eq!(one.taken(), Some(0x3f));
    one.write(reg::EOI, 0);
    assert_eq!(one.write(reg::EOI, 0), None, "EOI with nothing in service");
    assert_eq!(one.read(reg::PPR), 0);
}

#[test]
fn task_priority_holds_back_whole_classes() {
    let one = One::new(0);
    one.write(reg::TPR, 0x45);
    assert_eq!((one.read(reg::PPR), one.lapic.cr8()), (0x45, 4));
    one.fixed(0x4f);
    assert!(!one.lapic.pending().interrupt);
    one.fixed(0x50);
    assert_eq!(one.taken(), Some(0x50));
    one.write(reg::EOI, 0);
    let kicks = one.kicks();
    one.lapic.set_cr8(3);
    assert_eq!(one.read(reg::TPR), 0x30);
    assert!(one.lapic.pending().interrupt);
    assert_eq!(one.kicks(), kicks + 1);
}

#[test]
fn eoi_of_a_level_interrupt_names_its_vector() {
    let one = One::new(0);
    one.lapic.accept(&message(0x61, true));
    assert_eq!(one.read(reg::TMR + 3), 2);
    one.taken();
    assert_eq!(one.write(reg::EOI, 0), Some(Effect::Eoi(0x61)));
    one.lapic.accept(&message(0x61, false));
    one.taken();
    assert_eq!(one.write(reg::EOI, 0), None, "the edge cleared the TMR bit");
    one.write(reg::SVR, 0x11ff); // suppress the broadcast
    one.lapic.accept(&message(0x61, true));
    one.taken();
    assert_eq!(one.write(reg::EOI, 0), None);
}

#[test]
fn software_disable_masks_and_refuses() {
    let one = One::new(1);
    one.write(reg::LVT_TIMER, 0x30);
    one.fixed(0x80);
    one.write(reg::SVR, 0xff);
    assert_eq!(one.read(reg::LVT_TIMER), 0x1_0030);
    one.write(reg::LVT_TIMER, 0x31);
    assert_eq!(one.read(reg::LVT_TIMER), 0x1_0031);
    assert_eq!(one.fixed(0x90), Delivery::Masked);
    assert_eq!(one.lapic.accept(&signal(Mode::Nmi, 0)), Delivery::Accepted);
    assert!(one.lapic.pending().nmi && one.lapic.take_nmi() && !one.lapic.take_nmi());
    assert_eq!(one.taken(), Some(0x80), "what was accepted stays");
}

#[test]
fn errors_show_after_a_write_and_interrupt() {
    let one = One::new(0);
    one.write(reg::LVT_ERROR, 0xfe);
    assert_eq!(one.fixed(0x0f), Delivery::Masked);
    assert_eq!(one.read(reg::ESR), 0);
    one.write(reg::ESR, 0);
    assert_eq!(one.read(reg::ESR), 1 << 6);
    assert_eq!(one.drain(), [0xfe]);
    assert_eq!(one.write(reg::ICR, 0x4_0005), None);
    one.read(0x3a);
    one.write(reg::ESR, 0);
    assert_eq!(one.read(reg::ESR), 1 << 5 | 1 << 7);
    one.write(reg::ESR, 0);
    assert_eq!(one.read(reg::ESR), 0);
    one.write(reg::LVT_ERROR, 3); // an illegal vector here does not go round in circles
    one.fixed(1);
    assert_eq!(one.drain(), [0xfe]);
}

#[test]
fn startup_ipis_are_only_for_those_who_wait() {
    let ap = One::new(3);
    assert_eq!(ap.lapic.accept(&signal(Mode::Startup, 0x9a)), Delivery::Accepted, "after power-up");
    assert_eq!(ap.lapic.take_startup(), Some(0x9a));
    assert_eq!(ap.lapic.accept(&signal(Mode::Startup, 0x9a)), Delivery::Masked, "the second one");
    assert!(!ap.lapic.pending().any());
    ap.fixed(0x40);
    ap.write(reg::LDR, 0x0800_0000);
    ap.lapic.accept(&signal(Mode::Init, 0));
    ap.lapic.accept(&signal(Mode::Startup, 0x12));
    assert!(ap.lapic.pending().init && !ap.lapic.pending().startup);
    assert_eq!(ap.lapic.take_startup(), None, "INIT first");
    assert!(ap.lapic.take_init());
    assert_eq!((ap.read(reg::ID), ap.read(reg::LDR), ap.read(reg::SVR)), (3 << 24, 0, 0xff));
    assert_eq!(ap.taken(), None);
    assert_eq!(ap.lapic.take_startup(), Some(0x12));
    let bsp = One::new(0);
    assert_eq!(bsp.lapic.accept(&signal(Mode::Startup, 1)), Delivery::Masked);
    bsp.lapic.accept(&signal(Mode::Init, 0));
    assert!(bsp.lapic.take_init());
    assert_eq!(bsp.lapic.accept(&signal(Mode::Startup, 1)), Delivery::Masked);
}

#[test]
fn lint0_carries_the_8259_pair() {
    let one = One::new(0);
    let set = |level| {
        one.pin.store(level, Ordering::Release);
        one.lapic.look_at_lint0();
    };
    assert_eq!(one.read(reg::LVT_LINT0), 0x700);
    set(true);
    assert!(one.lapic.pending().interrupt);
    one.lapic.set_cr8(15);
    assert_eq!(one.lapic.acknowledge(), Err(()), "ExtINT does not heed priorities");
    one.lapic.set_cr8(0);
    one.write(reg::LVT_LINT0, 0x1_0700);
    assert!(!one.lapic.pending().any());
    set(false);
    one.write(reg::LVT_LINT0, 0x31); // virtual wire, fixed
    set(true);
    set(true);
    assert_eq!(one.drain(), [0x31]);
    set(false);
    one.write(reg::LVT_LINT0, 0x400);
    set(true);
    assert!(one.lapic.take_nmi());
    one.lapic.set_apic_base(0xfee0_0000).unwrap();
    assert!(one.lapic.pending().interrupt, "a disabled APIC makes LINT0 the INTR pin");
}

#[test]
fn base_register_takes_only_legal_steps() {
    const OFF: u64 = 0xfee0_0000;
    const X: u64 = OFF | 1 << 11;
    const X2: u64 = X | 1 << 10;
    for (path, legal) in [
        (&[OFF][..], true),
        (&[X2], true),
        (&[OFF | 1 << 10], false),
        (&[OFF, X2], false),
        (&[OFF, X, X2], true),
        (&[X2, X], false),
        (&[X2, OFF, X], true),
        (&[X | 1], false),
        (&[X | 1 << 9], false),
        (&[X | 1 << 52], false),
    ] {
        let one = One::new(1);
        let (last, first) = path.split_last().unwrap();
        for value in first {
            one.lapic.set_apic_base(*value).unwrap();
        }
        assert_eq!(one.lapic.set_apic_base(*last).is_ok(), legal, "{path:x?}");
    }
    let one = One::new(0);
    assert_eq!(one.lapic.apic_base(), X | 1 << 8);
    one.lapic.set_apic_base(OFF).unwrap();
    assert_eq!(one.lapic.page_read(reg::ID), None);
    assert_eq!(one.fixed(0x40), Delivery::Masked);
    one.lapic.set_apic_base(X).unwrap();
    assert_eq!(one.lapic.apic_base(), X | 1 << 8, "the BSP flag stays");
    assert_eq!(one.read(reg::SVR), 0xff, "registers were reset");
}

#[test]
fn x2apic_registers_fault_as_the_manual_says() {
    let one = One::x2apic(0x25);
    let lapic = &one.lapic;
    assert_eq!(lapic.page_read(reg::ID), None);
    assert_eq!(lapic.msr_read(reg::ID), Ok(0x25));
    assert_eq!(lapic.msr_read(reg::LDR), Ok(0x2_0020));
    assert_eq!(lapic.msr_read(reg::VERSION), Ok(0x0105_0014));
    for register in [0, 1, 4, 9, 0xb, 0xc, 0xe, 0x29, 0x2f, 0x31, 0x3a, 0x3f, 0x40, 0xff] {
        assert_eq!(lapic.msr_read(register), Err(MsrFault), "{register:#x}");
    }
    let ok: &[(u8, u64)] = &[
        (reg::TPR, 0xff),
        (reg::TPR, 0),
        (reg::EOI, 0),
        (reg::SVR, 0x11ff),
        (reg::ESR, 0),
        (reg::ICR, 0xffff_fffe_000c_0830),
        (reg::LVT_TIMER, 0x5_00ec),
        (reg::LVT_LINT0, 0x1_8700),
        (reg::LVT_ERROR, 0xfe),
        (reg::INITIAL, 0xffff_ffff),
        (reg::DIVIDE, 0xb),
        (reg::SELF_IPI, 0x41),
    ];
    for (register, value) in ok {
        assert!(lapic.msr_write(*register, *value).is_ok(), "{register:#x} = {value:#x}");
    }
    let bad: &[(u8, u64)] = &[
        (reg::ID, 0),
        (reg::VERSION, 0),
        (reg::TPR, 0x100),
        (reg::PPR, 0),
        (reg::EOI, 1),
        (reg::LDR, 0),
        (reg::DFR, 0),
        (reg::SVR, 1 << 10),
        (reg::ISR, 0),
        (reg::IRR + 7, 0),
        (reg::ESR, 1),
        (reg::ICR, 1 << 13),
        (reg::ICR, 1 << 20),
        (reg::ICR_HIGH, 0),
        (reg::LVT_TIMER, 0x6_00ec),
        (reg::LVT_TIMER, 1 << 8),
        (reg::LVT_LINT0, 1 << 17),
        (reg::LVT_ERROR, 1 << 10),
        (reg::INITIAL, 1 << 32),
        (reg::CURRENT, 0),
        (reg::DIVIDE, 4),
        (reg::SELF_IPI, 0x100),
        (0x2f, 0),
        (0xff, 0),
    ];
    for (register, value) in bad {
        assert_eq!(lapic.msr_write(*register, *value), Err(MsrFault), "{register:#x} = {value:#x}");
    }
    let own = lapic.msr_write(reg::SELF_IPI, 0x41).unwrap();
    assert!(matches!(own, Some(Effect::Ipi(Ipi { shorthand: Shorthand::Own, .. }))));
    let xapic = One::new(0);
    assert_eq!(xapic.lapic.msr_read(reg::ID), Err(MsrFault));
    assert_eq!(xapic.lapic.msr_write(reg::TPR, 0), Err(MsrFault));
}

#[test]
fn destinations() {
    let to = |dest, wide, logical| Message { dest, wide, logical, ..message(0x40, false) };
    let hit = |one: &One, message: &Message| one.lapic.arbitration(message).is_some();
    let flat = One::new(2);
    flat.write(reg::LDR, 0x0400_0000);
    assert!(hit(&flat, &to(2, false, false)) && !hit(&flat, &to(4, false, false)));
    assert!(hit(&flat, &to(0x06, false, true)) && !hit(&flat, &to(0x0b, false, true)));
    assert!(hit(&flat, &to(0xff, false, false)) && hit(&flat, &to(0xff, false, true)));
    flat.write(reg::DFR, 0);
    flat.write(reg::LDR, 0x3400_0000);
    for (dest, expected) in [(0x34, true), (0x3e, true), (0x31, false), (0x24, false), (0xf4, true)] {
        assert_eq!(hit(&flat, &to(dest, false, true)), expected, "{dest:#x}");
    }
    let x2 = One::x2apic(0x25); // cluster 2, member 5
    for (dest, expected) in [
        (0x0002_0020, true),
        (0x0002_ffff, true),
        (0x0002_ffdf, false),
        (0x0001_0020, false),
        (0x0000_0020, false),
        (u32::MAX, true),
    ] {
        assert_eq!(hit(&x2, &to(dest, true, true)), expected, "{dest:#x}");
    }
    assert!(hit(&x2, &to(0x25, true, false)) && !hit(&x2, &to(0xff, true, false)));
    assert!(hit(&x2, &to(0xff, false, false)));
    let first = One::x2apic(3);
    assert!(hit(&first, &to(0x08, false, true)), "an 8-bit logical ID is in cluster 0");
}

#[test]
fn icr_and_msi_words_decode() {
    let ipi = |icr| Ipi::from_icr(icr, true);
    assert_eq!(ipi(0x8500), None, "INIT level de-assert");
    assert_eq!(ipi(0x4_4500), None, "INIT to oneself by shorthand");
    assert_eq!(ipi(0x200), None, "SMI");
    let init = ipi(0x7_0000_c500).unwrap();
    assert_eq!((init.message.mode, init.message.dest, init.shorthand), (Mode::Init, 7, Shorthand::None));
    let nmi = ipi(0xc_0400).unwrap();
    assert_eq!((nmi.message.mode, nmi.shorthand), (Mode::Nmi, Shorthand::Others));
    let short = Ipi::from_icr(0x0900_0000_0000_0830, false).unwrap();
    assert_eq!((short.message.dest, short.message.wide, short.message.logical), (9, false, true));

    let msi = |address, data| Message::from_msi(MsiMessage { address, data });
    let plain = msi(0xfee0_5000, 0x41).unwrap();
    assert_eq!(plain, Message { dest: 5, ..message(0x41, false) });
    assert_eq!(msi(0xfee0_300c, 0x41).unwrap().mode, Mode::Lowest, "redirection hint");
    assert!(msi(0xfee0_3004, 0x41).unwrap().logical);
    assert!(msi(0xfee0_0000, 0xc041).unwrap().level);
    assert_eq!(msi(0xfee0_0000, 0x8041), None, "level de-assert");
    assert_eq!(msi(0xfed0_0000, 0x41), None);
    assert_eq!(msi(0x1_fee0_0000, 0x41), None);
}

#[test]
fn one_shot_counts_down_once() {
    let one = One::new(0);
    one.write(reg::LVT_TIMER, 0xec);
    for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1u64)] {
        one.write(reg::DIVIDE, code);
        one.write(reg::INITIAL, 1000);
        assert_eq!(one.read(reg::CURRENT), 1000);
        one.clock.run(Nanos(400 * divisor));
        assert_eq!(one.read(reg::CURRENT), 600, "/{divisor}");
        one.clock.run(Nanos(600 * divisor - 1));
        assert_eq!((one.read(reg::CURRENT), one.taken()), (1, None));
        one.clock.run(Nanos(1));
        assert_eq!((one.read(reg::CURRENT), one.drain()), (0, vec![0xec]));
        one.clock.run(Nanos(10_000 * divisor));
        assert_eq!(one.drain(), [0u8; 0]);
    }
    one.write(reg::INITIAL, 1000);
    one.write(reg::INITIAL, 0);
    one.clock.run(Nanos(5000));
    assert_eq!((one.drain(), one.read(reg::CURRENT)), (vec![], 0));
    one.write(reg::LVT_TIMER, 0x1_00ec);
    one.write(reg::INITIAL, 10);
    one.clock.run(Nanos(10));
    assert_eq!(one.drain(), [0u8; 0], "masked");
}

#[test]
fn periodic_stays_on_its_grid() {
    let one = One::new(0);
    one.write(reg::DIVIDE, 3);
    one.write(reg::LVT_TIMER, 0x2_00ec);
    one.clock.run(Nanos(123));
    one.write(reg::INITIAL, 62_500); // 1 ms
    for tick in 1..=5 {
        one.clock.run(Nanos(1_000_000));
        assert_eq!(one.drain(), [0xec], "{tick}");
    }
    // Late by two and a half periods: one tick, and the next where the grid has it.
    one.base().advance(Nanos(2_500_000));
    assert_eq!(one.read(reg::CURRENT), 31_250, "the counter does not wait for the interrupt");
    one.clock.queue.run_due();
    assert_eq!(one.drain(), [0xec]);
    one.clock.run(Nanos(499_999));
    assert_eq!(one.drain(), [0u8; 0]);
    one.clock.run(Nanos(1));
    assert_eq!(one.drain(), [0xec]);
    // To one-shot in the middle of a period: this one is the last.
    one.clock.run(Nanos(400_000));
    one.write(reg::LVT_TIMER, 0xec);
    one.clock.run(Nanos(600_000));
    assert_eq!(one.drain(), [0xec]);
    one.clock.run(Nanos(5_000_000));
    assert_eq!(one.drain(), [0u8; 0]);
}

#[test]
fn the_shortest_period_does_not_flood() {
    let one = One::new(0);
    one.write(reg::DIVIDE, 11);
    one.write(reg::LVT_TIMER, 0x2_00ec);
    one.write(reg::INITIAL, 1);
    let mut ticks = 0;
    for _ in 0..1000 {
        one.base().advance(Nanos(1000));
        one.clock.queue.run_due();
        ticks += one.drain().len();
    }
    assert!((45..=51).contains(&ticks), "{ticks}");
}

#[test]
fn tsc_deadline() {
    let one = One::new(0);
    one.lapic.write_deadline(500);
    assert_eq!(one.lapic.read_deadline(), 0, "not in that mode");
    one.write(reg::LVT_TIMER, 0x4_00ec);
    one.write(reg::INITIAL, 100);
    assert_eq!((one.read(reg::INITIAL), one.read(reg::CURRENT)), (0, 0));
    one.lapic.write_deadline(5000);
    assert_eq!(one.lapic.read_deadline(), 5000);
    one.clock.run(Nanos(4999));
    assert_eq!(one.drain(), [0u8; 0]);
    one.clock.run(Nanos(1));
    assert_eq!((one.drain(), one.lapic.read_deadline()), (vec![0xec], 0));
    let kicks = one.kicks();
    one.lapic.write_deadline(4000); // in the past
    assert_eq!((one.kicks(), one.lapic.read_deadline()), (kicks + 1, 0));
    assert_eq!(one.drain(), [0xec]);
    one.lapic.write_deadline(6000);
    one.lapic.write_deadline(0);
    one.clock.run(Nanos(2000));
    assert_eq!(one.drain(), [0u8; 0]);
    one.lapic.write_deadline(u64::MAX);
    one.clock.run(Nanos::SECOND);
    assert_eq!(one.drain(), [0u8; 0]);
    one.lapic.write_deadline(one.base().tsc() + 1000);
    one.write(reg::LVT_TIMER, 0xec); // leaving the mode disarms
    one.clock.run(Nanos(2000));
    assert_eq!((one.drain(), one.lapic.read_deadline()), (vec![], 0));
    one.write(reg::LVT_TIMER, 0x4_00ec);
    one.lapic.set_tsc_adjust(1_000_000);
    one.lapic.write_deadline(one.base().tsc() + 1_000_500);
    one.clock.run(Nanos(499));
    assert_eq!(one.drain(), [0u8; 0]);
    one.lapic.set_tsc_adjust(1_000_001); // the vCPU's TSC jumps past it
    assert_eq!(one.drain(), [0xec]);
}

#[test]
fn a_kick_for_what_came_before_the_vcpu() {
    let clock = Clock::new();
    let lapic = Lapic::new(1, &clock.queue, Arc::default(), TickConfig::default());
    lapic.accept(&signal(Mode::Init, 0));
    let kicks = Arc::new(Kicks::default());
    lapic.attach(kicks.clone());
    assert_eq!(kicks.0.load(Ordering::Relaxed), 1);
}
