use std::sync::Arc;

use super::{A, B, C, D, DAY, HOURS, MINUTES, MONTH, MemorySize, Rtc, SECONDS, WEEKDAY, YEAR};
use crate::hpet::LegacyRouting;
use crate::layout::GSI_RTC;
use crate::testing::{Clock, at, read};
use crate::wire::tests::Recorder;
use wardian_bus::Device;
use wardian_time::{Nanos, TickConfig};

/// 2026-12-31T23:59:58.25Z, a Thursday.
const EVE: Nanos = Nanos(1_798_761_598_250_000_000);
const ALARM_SECONDS: usize = 1;
const ALARM_MINUTES: usize = 3;
const ALARM_HOURS: usize = 5;
const CENTURY: usize = super::CENTURY as usize;

struct Rig {
    clock: Clock,
    chip: Arc<Recorder>,
    routing: LegacyRouting,
    rtc: Arc<Rtc>,
}

impl Rig {
    fn new() -> Rig {
        let clock = Clock::at_wall(EVE);
        let (chip, routing) = (Recorder::new(), LegacyRouting::default());
        let memory = MemorySize { low: 512 << 20, high: 0x1_2345_0000 };
        let rtc = Rtc::new(&clock.queue, chip.line(GSI_RTC), memory, routing.clone(), TickConfig::default());
        Rig { clock, chip, routing, rtc }
    }

    fn get(&self, register: usize) -> u8 {
        self.rtc.write(at(0), &[register as u8]);
        read::<1>(&*self.rtc, 1)[0]
    }

    fn put(&self, register: usize, value: u8) {
        self.rtc.write(at(0), &[register as u8]);
        self.rtc.write(at(1), &[value]);
    }

    fn time(&self) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|register| self.get(register))
    }

    fn set_time(&self, time: [u8; 8]) {
        let registers = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS];
        for (register, value) in registers.into_iter().zip(time) {
            self.put(register, value);
        }
    }

    fn run_ms(&self, ms: u64) {
        self.clock.run(Nanos(ms * 1_000_000));
    }
}

#[test]
fn the_year_rolls_over() {
    let rig = Rig::new();
    assert_eq!(rig.get(D), 0x80);
    assert_eq!(rig.time(), [0x20, 0x26, 0x12, 0x31, 5, 0x23, 0x59, 0x58]);
    rig.run_ms(1_749);
    assert_eq!(rig.time(), [0x20, 0x26, 0x12, 0x31, 5, 0x23, 0x59, 0x59]);
    rig.run_ms(1);
    assert_eq!(rig.time(), [0x20, 0x27, 0x01, 0x01, 6, 0, 0, 0]);
}

#[test]
fn binary_and_twelve_hours() {
    let rig = Rig::new();
    rig.put(B, 0x04);
    assert_eq!(rig.time(), [20, 26, 12, 31, 5, 0x80 | 11, 59, 58]);
    rig.run_ms(2_000);
    assert_eq!(rig.get(HOURS), 12);
}

#[test]
fn update_in_progress_shows_before_the_second_ends() {
    let rig = Rig::new();
    assert_eq!(rig.get(A), 0x26);
    rig.clock.run(Nanos(749_000_000));
    assert_eq!(rig.get(A), 0x26);
    rig.clock.run(Nanos(800_000));
    assert_eq!(rig.get(A), 0xa6);
    assert_eq!(rig.get(SECONDS), 0x58);
    rig.clock.run(Nanos(200_000));
    assert_eq!(rig.get(A), 0x26);
    assert_eq!(rig.get(SECONDS), 0x59);
}

#[test]
fn the_guest_sets_the_time_as_linux_does() {
    let rig = Rig::new();
    rig.put(B, 0x82);
    assert_eq!(rig.get(SECONDS), 0x58);
    rig.run_ms(5_000); // held
    assert_eq!(rig.get(SECONDS), 0x58);
    rig.put(A, 0x76);
    rig.set_time([0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]);
    rig.put(B, 0x02);
    rig.put(A, 0x26);
    assert_eq!(rig.time(), [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]);
    rig.run_ms(499); // half a second after the release of the divider
    assert_eq!(rig.get(SECONDS), 0x59);
    rig.run_ms(2);
    assert_eq!(rig.time(), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
    rig.run_ms(3_600_000);
    assert_eq!(rig.get(HOURS), 0x01);
}

#[test]
fn one_register_written_without_holding_the_clock() {
    let rig = Rig::new();
    rig.put(HOURS, 0x05);
    assert_eq!(rig.time(), [0x20, 0x26, 0x12, 0x31, 5, 0x05, 0x59, 0x58]);
    rig.run_ms(750); // the phase stays
    assert_eq!(rig.get(SECONDS), 0x59);
}

#[test]
fn periodic_ticks_keep_the_quartz_rate() {
    let rig = Rig::new();
    let mut count = 0;
    rig.put(B, 0x42);
    for _ in 0..20 {
        rig.put(A, 0x26); // 1024 Hz; writing the rate does not move the grid
    }
    while rig.clock.base.now() < Nanos(10 * 1_000_000_000) {
        let next = rig.clock.queue.next_deadline().unwrap();
        rig.clock.run(next.saturating_sub(rig.clock.base.now()));
        assert!(rig.chip.level(GSI_RTC));
        assert_eq!(rig.get(C) & 0xc0, 0xc0);
        assert!(!rig.chip.level(GSI_RTC));
        count += 1;
    }
    assert_eq!(count, 10_240);
    assert_eq!(rig.chip.edges(GSI_RTC), 10_240);
}

#[test]
fn an_unread_periodic_flag_arms_no_host_timer() {
    let rig = Rig::new();
    rig.put(A, 0x23);
    rig.put(B, 0x42);
    rig.run_ms(1_000);
    assert_eq!(rig.chip.edges(GSI_RTC), 1);
    assert_eq!(rig.clock.queue.next_deadline(), None);
    assert_ne!(rig.get(C), 0);
    assert_eq!(rig.get(C), 0);
    assert!(rig.clock.queue.next_deadline().is_some());
    rig.put(A, 0x20); // rate 0: none
    assert_eq!(rig.clock.queue.next_deadline(), None);
}

#[test]
fn update_ended_interrupt_comes_at_the_second() {
    let rig = Rig::new();
    rig.put(A, 0x20);
    rig.put(B, 0x12);
    rig.clock.run(Nanos(749_999_999));
    assert!(!rig.chip.level(GSI_RTC));
    rig.clock.run(Nanos(1));
    assert!(rig.chip.level(GSI_RTC));
    assert_eq!(rig.get(C), 0x90);
    assert!(!rig.chip.level(GSI_RTC));
    rig.run_ms(1_000);
    assert_eq!(rig.chip.edges(GSI_RTC), 2);
    // Holding the clock turns the interrupt off.
    rig.put(B, 0x92);
    assert_eq!(rig.get(B), 0x82);
}

#[test]
fn alarms_with_and_without_wildcards() {
    let rig = Rig::new();
    rig.put(A, 0x20);
    for (register, value) in [(ALARM_HOURS, 0x00), (ALARM_MINUTES, 0x02), (ALARM_SECONDS, 0x03)] {
        rig.put(register, value);
    }
    rig.put(B, 0x22);
    rig.run_ms(124_000);
    assert!(!rig.chip.level(GSI_RTC));
    rig.run_ms(1_000);
    assert!(rig.chip.level(GSI_RTC));
    assert_eq!(rig.get(C), 0xb0); // the update flag as well
    rig.put(ALARM_HOURS, 0xff);
    rig.put(ALARM_MINUTES, 0xc0);
    for minute in 0..3 {
        assert_eq!(rig.chip.edges(GSI_RTC), 1 + minute);
        rig.run_ms(60_000);
        assert_eq!(rig.get(C) & 0xa0, 0xa0);
    }
    rig.put(ALARM_SECONDS, 0x60); // no such second
    assert_eq!(rig.clock.queue.next_deadline(), None);
    rig.run_ms(86_400_000);
    assert_eq!(rig.get(C) & 0x20, 0);
}

#[test]
fn the_hpet_takes_the_line() {
    let rig = Rig::new();
    rig.routing.set(true);
    rig.put(B, 0x12);
    rig.run_ms(3_000);
    assert_eq!(rig.chip.edges(GSI_RTC), 0);
    assert_eq!(rig.get(C) & 0x90, 0x90);
}

#[test]
fn memory_and_the_nmi_mask() {
    let rig = Rig::new();
    assert_eq!([rig.get(0x15), rig.get(0x16)], [0x80, 0x02]);
    assert_eq!([rig.get(0x30), rig.get(0x31)], [0x00, 0xfc]);
    assert_eq!([rig.get(0x34), rig.get(0x35)], [0x00, 0x1f]); // 496 MiB in 64 KiB
    assert_eq!([rig.get(0x5b), rig.get(0x5c), rig.get(0x5d)], [0x45, 0x23, 0x01]);
    rig.put(0x7f, 0x77);
    assert!(!rig.rtc.nmi_masked());
    rig.rtc.write(at(0), &[0xff]);
    assert!(rig.rtc.nmi_masked());
    assert_eq!(read::<2>(&*rig.rtc, 0), [0xff, 0x77]);
    // One word access: index and data.
    rig.rtc.write(at(0), &[0x7e, 0x12]);
    assert_eq!(rig.get(0x7e), 0x12);
}

#[test]
fn hostile_register_values_do_no_harm() {
    let rig = Rig::new();
    for value in [0x00, 0x7f, 0x80, 0x99, 0xc0, 0xff] {
        for b in [0x72, 0x76, 0x70, 0xf6, 0xff] {
            for register in (0..0x0a).chain([A, C, D, CENTURY]) {
                rig.put(register, value);
                rig.put(B, b);
                rig.run_ms(700);
                rig.get(C);
                rig.time();
            }
        }
    }
    rig.rtc.write(at(1), &[0xff; 8]);
    read::<8>(&*rig.rtc, 1);
}
