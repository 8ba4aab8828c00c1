use std::sync::Arc;

use super::{Hpet, HpetState, LegacyRouting, MIN_PERIOD_TICKS};
use crate::layout::{GSI_RTC, GSI_TIMER};
use crate::testing::{Clock, at, read};
use crate::wire::tests::Recorder;
use wardian_bus::Device;
use wardian_irq::{Gsi, IrqChip};
use wardian_time::{Nanos, TickConfig};

const CONFIG: u64 = 0x10;
const STATUS: u64 = 0x20;
const COUNTER: u64 = 0xf0;
const LEVEL: u64 = 1 << 1;
const ENABLE: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const SET_VALUE: u64 = 1 << 6;
const NARROW: u64 = 1 << 8;
const GSI20: Gsi = Gsi(20);
const TO_20: u64 = 20 << 9;
/// Ticks of 1 ms and of 1/1024 s.
const MS: u64 = 100_000;
const TINY: u64 = 97_656;

fn config_of(timer: u64) -> u64 {
    0x100 + 0x20 * timer
}

fn comparator_of(timer: u64) -> u64 {
    0x108 + 0x20 * timer
}

struct Rig {
    clock: Clock,
    chip: Arc<Recorder>,
    routing: LegacyRouting,
    hpet: Arc<Hpet>,
}

impl Rig {
    fn new() -> Rig {
        let clock = Clock::new();
        let (chip, routing) = (Recorder::new(), LegacyRouting::default());
        let hpet = Hpet::new(
            &clock.queue,
            &(Arc::clone(&chip) as Arc<dyn IrqChip>),
            routing.clone(),
            TickConfig::default(),
        );
        Rig { clock, chip, routing, hpet }
    }

    /// With the counter running.
    fn running() -> Rig {
        let rig = Rig::new();
        rig.put(CONFIG, 1);
        rig
    }

    fn get(&self, offset: u64) -> u64 {
        u64::from_le_bytes(read(&*self.hpet, offset))
    }

    fn put(&self, offset: u64, value: u64) {
        self.hpet.write(at(offset), &value.to_le_bytes());
    }

    fn put32(&self, offset: u64, value: u32) {
        self.hpet.write(at(offset), &value.to_le_bytes());
    }

    fn run(&self, ticks: u64) {
        self.clock.run(Nanos(ticks * 10));
    }

    /// Starts timer 2 on input 20: first at `first`, then every `period` ticks.
    fn periodic(&self, first: u64, period: u64, more: u64) {
        self.put(config_of(2), ENABLE | PERIODIC | SET_VALUE | TO_20 | more);
        self.put(comparator_of(2), first);
        self.put(comparator_of(2), period);
    }

    fn edges(&self) -> usize {
        self.chip.edges(GSI20)
    }
}

#[test]
fn capabilities_and_the_width_of_accesses() {
    let rig = Rig::new();
    assert_eq!(rig.get(0), 0x0098_9680_8086_a201);
    assert_eq!(read::<4>(&*rig.hpet, 4), 10_000_000u32.to_le_bytes());
    rig.put(0, 0);
    rig.put32(COUNTER, 0x89ab_cdef);
    rig.put32(COUNTER + 4, 0x0123_4567);
    assert_eq!(rig.get(COUNTER), 0x0123_4567_89ab_cdef);
    assert_eq!(read::<2>(&*rig.hpet, COUNTER + 2), [0xab, 0x89]);
    // Misaligned, narrow or beyond the end: nothing.
    rig.hpet.write(at(COUNTER + 1), &[0; 4]);
    rig.hpet.write(at(COUNTER), &[0; 2]);
    rig.put(0x3f8, u64::MAX);
    read::<8>(&*rig.hpet, 0x3fc);
    assert_eq!(rig.get(COUNTER), 0x0123_4567_89ab_cdef);
    assert_eq!(rig.get(config_of(0)) & 0xffff_fe00_0000_00ff, 0x00f0_0000_0000_0030);
    assert_eq!(rig.get(0x160), 0);
}

#[test]
fn the_counter_stops_and_goes_on() {
    let rig = Rig::running();
    rig.run(1000);
    assert_eq!(rig.get(COUNTER), 1000);
    rig.put(COUNTER, 5); // not while it runs
    rig.put(CONFIG, 0);
    rig.run(1000);
    assert_eq!(rig.get(COUNTER), 1000);
    rig.put(COUNTER, 7);
    rig.put(CONFIG, 1);
    rig.run(3);
    assert_eq!(rig.get(COUNTER), 10);
}

#[test]
fn one_shot_edge() {
    let rig = Rig::running();
    rig.put(config_of(2), ENABLE | TO_20);
    rig.put(comparator_of(2), 500);
    rig.run(499);
    assert_eq!(rig.edges(), 0);
    rig.run(1);
    assert_eq!((rig.edges(), rig.chip.level(GSI20)), (1, false));
    rig.run(10 * MS);
    // Neither a rewrite of the configuration nor the status register brings it back.
    rig.put(config_of(2), ENABLE | TO_20);
    assert_eq!((rig.edges(), rig.get(STATUS)), (1, 0));
}

#[test]
fn level_stays_until_the_status_bit_is_cleared() {
    let rig = Rig::running();
    rig.periodic(MS, MS, LEVEL);
    rig.run(3 * MS + MS / 2);
    assert_eq!((rig.edges(), rig.chip.level(GSI20), rig.get(STATUS)), (1, true, 4));
    rig.put(STATUS, 4);
    assert_eq!((rig.chip.level(GSI20), rig.get(STATUS)), (false, 0));
    rig.run(MS / 2);
    assert_eq!((rig.edges(), rig.chip.level(GSI20)), (2, true));
    // Masking lowers the line, not the status.
    rig.put(config_of(2), PERIODIC | LEVEL | TO_20);
    assert_eq!((rig.chip.level(GSI20), rig.get(STATUS)), (false, 4));
    rig.put(config_of(2), ENABLE | PERIODIC | LEVEL | (21 << 9));
    assert!(rig.chip.level(Gsi(21)));
    rig.put(CONFIG, 0);
    assert!(!rig.chip.level(Gsi(21)));
}

#[test]
fn legacy_replacement_routes_timers_0_and_1() {
    let rig = Rig::new();
    assert!(!rig.routing.is_on());
    rig.put(CONFIG, 3);
    assert!(rig.routing.is_on());
    for timer in 0..2 {
        rig.put(config_of(timer), ENABLE | TO_20);
        rig.put(comparator_of(timer), 1000 + timer);
    }
    rig.run(1000);
    assert_eq!((rig.chip.edges(GSI_TIMER), rig.chip.edges(GSI_RTC)), (1, 0));
    rig.run(1);
    assert_eq!((rig.chip.edges(GSI_TIMER), rig.chip.edges(GSI_RTC), rig.edges()), (1, 1, 0));
    // The PIT has lost its line meanwhile.
    let pit = rig.routing.gate(rig.chip.line(GSI_TIMER));
    pit.pulse();
    assert_eq!(rig.chip.edges(GSI_TIMER), 1);
    rig.put(CONFIG, 1);
    assert!(!rig.routing.is_on());
    pit.pulse();
    assert_eq!(rig.chip.edges(GSI_TIMER), 2);
    rig.put(comparator_of(0), 2000);
    rig.run(2000);
    assert_eq!((rig.chip.edges(GSI_TIMER), rig.edges()), (2, 1));
}

#[test]
fn an_impossible_route_is_not_taken() {
    let rig = Rig::new();
    for (written, read) in [(22, 22), (5, 22), (31, 22), (23, 23)] {
        rig.put(config_of(1), written << 9);
        assert_eq!(rig.get(config_of(1)) >> 9 & 0x1f, read);
    }
    // FSB delivery is not there either.
    rig.put(config_of(1), 1 << 14);
    assert_eq!(rig.get(config_of(1)) & (3 << 14), 0);
}

// The nine rules of the reference (time.md, 2.1).

#[test]
fn rule_1_all_timers_see_one_now() {
    let rig = Rig::running();
    // Two timers set to the same point by different ways are due in the same instant.
    rig.put(config_of(0), ENABLE | TO_20);
    rig.put(comparator_of(0), 3 * MS);
    rig.put(config_of(1), ENABLE | PERIODIC | SET_VALUE | (21 << 9));
    rig.put(comparator_of(1), MS);
    rig.put(comparator_of(1), MS);
    rig.clock.base.advance(Nanos(3 * MS * 10)); // nobody served the queue
    assert_eq!(rig.get(comparator_of(1)), 4 * MS);
    assert_eq!((rig.edges(), rig.chip.edges(Gsi(21))), (1, 1));
    assert_eq!(rig.get(COUNTER), 3 * MS);
}

#[test]
fn rule_2_a_write_sets_the_comparator_or_the_period() {
    let rig = Rig::running();
    rig.put(config_of(2), ENABLE | PERIODIC | SET_VALUE | TO_20);
    assert_ne!(rig.get(config_of(2)) & SET_VALUE, 0);
    rig.put(comparator_of(2), 5 * MS);
    assert_eq!(rig.get(config_of(2)) & SET_VALUE, 0);
    rig.put(comparator_of(2), 2 * MS);
    assert_eq!(rig.get(comparator_of(2)), 5 * MS);
    rig.run(5 * MS);
    assert_eq!((rig.edges(), rig.get(comparator_of(2))), (1, 7 * MS));
    // A comparator alone does not change the period.
    rig.put(config_of(2), ENABLE | PERIODIC | SET_VALUE | TO_20);
    rig.put(comparator_of(2), 6 * MS);
    rig.run(MS);
    assert_eq!((rig.edges(), rig.get(comparator_of(2))), (2, 8 * MS));
    // Nor does SET_VALUE stay in a timer that is not periodic.
    rig.put(config_of(1), SET_VALUE);
    assert_eq!(rig.get(config_of(1)) & SET_VALUE, 0);
}

#[test]
fn rule_3_the_period_has_a_least_and_a_greatest_value() {
    for (written, effective) in [(1, MIN_PERIOD_TICKS), (MIN_PERIOD_TICKS + 1, MIN_PERIOD_TICKS + 1)] {
        let rig = Rig::running();
        rig.periodic(MS, written, 0);
        rig.run(MS);
        assert_eq!(rig.get(comparator_of(2)), MS + effective);
    }
    let rig = Rig::running();
    rig.periodic(MS, 0xffff_ffff, NARROW);
    rig.run(MS);
    assert_eq!(rig.get(comparator_of(2)), MS + 0x7fff_ffff);
    let rig = Rig::running();
    rig.periodic(MS, u64::MAX, 0);
    rig.run(MS);
    assert_eq!(rig.get(comparator_of(2)), MS + u64::MAX / 2);
    // Two halves written one after the other are one value, not two clamped ones.
    let rig = Rig::running();
    rig.put(config_of(2), ENABLE | PERIODIC | SET_VALUE | TO_20);
    rig.put(comparator_of(2), MS);
    rig.put32(comparator_of(2), 5);
    rig.put32(comparator_of(2) + 4, 1);
    rig.run(MS);
    assert_eq!(rig.get(comparator_of(2)), MS + (1 << 32) + 5);
}

#[test]
fn rule_4_a_stopped_counter_is_saved_as_it_stands() {
    let rig = Rig::running();
    rig.run(777);
    rig.put(CONFIG, 0);
    rig.run(1000);
    assert_eq!(rig.hpet.save().counter, 777);
    rig.put(CONFIG, 1);
    rig.run(3);
    assert_eq!(rig.hpet.save().counter, 780);
}

#[test]
fn rule_5_comparators_are_moved_on_before_they_are_saved() {
    let rig = Rig::running();
    rig.periodic(MS, MS, 0);
    rig.clock.base.advance(Nanos(10 * (4 * MS + 1)));
    assert_eq!(rig.hpet.save().timers[2].comparator, 5 * MS);
    assert_eq!(rig.edges(), 1);
}

#[test]
fn rule_6_comparators_reset_to_all_ones() {
    let rig = Rig::running();
    for timer in 0..3 {
        assert_eq!(rig.get(comparator_of(timer)), u64::MAX);
        assert_eq!(rig.hpet.save().timers[timer as usize].comparator, u64::MAX);
        rig.put(config_of(timer), ENABLE | TO_20 | NARROW);
        assert_eq!(rig.get(comparator_of(timer)), 0xffff_ffff);
    }
    rig.run(1 << 33);
    assert_eq!(rig.edges(), 0);
}

#[test]
fn rule_7_comparators_stand_while_the_counter_stands() {
    let rig = Rig::running();
    rig.periodic(MS, MS, 0);
    rig.run(2 * MS + 1);
    rig.put(CONFIG, 0);
    rig.run(10 * MS);
    assert_eq!((rig.edges(), rig.get(comparator_of(2)), rig.get(COUNTER)), (2, 3 * MS, 2 * MS + 1));
    rig.put(CONFIG, 1);
    rig.run(MS);
    assert_eq!((rig.edges(), rig.get(comparator_of(2))), (3, 4 * MS));
}

#[test]
fn rule_8_at_equality_the_comparator_is_the_next_period() {
    let rig = Rig::running();
    rig.periodic(MS, MS, 0);
    rig.run(MS - 1);
    assert_eq!(rig.get(comparator_of(2)), MS);
    rig.run(1);
    assert_eq!((rig.get(COUNTER), rig.get(comparator_of(2)), rig.edges()), (MS, 2 * MS, 1));
    rig.run(1000 * MS);
    assert_eq!((rig.get(comparator_of(2)), rig.edges()), (1002 * MS, 1001));
}

#[test]
fn rule_9_a_comparator_in_the_past_fires_at_once() {
    let rig = Rig::running();
    rig.run(10 * MS);
    rig.put(config_of(2), ENABLE | TO_20);
    rig.put(comparator_of(2), 2 * MS); // 64 bits: past is past
    assert_eq!(rig.edges(), 1);
    rig.put(comparator_of(2), 10 * MS); // and equal is now
    assert_eq!(rig.edges(), 2);
    rig.put(config_of(2), ENABLE | TO_20 | NARROW);
    rig.put(comparator_of(2), 10 * MS - TINY); // 32 bits: a little behind is past
    assert_eq!(rig.edges(), 3);
    rig.put(comparator_of(2), 10 * MS - TINY - 1); // further behind: after the wrap
    assert_eq!(rig.edges(), 3);
    rig.run((1 << 32) - TINY - 2);
    assert_eq!(rig.edges(), 3);
    rig.run(1);
    assert_eq!(rig.edges(), 4);
}

#[test]
fn rule_9_after_restore_any_wrap_is_past() {
    let rig = Rig::running();
    rig.run(10 * MS);
    rig.put(config_of(2), ENABLE | TO_20 | NARROW);
    rig.put(comparator_of(2), 20 * MS);
    let state = rig.hpet.save();
    // The machine slept while its clock went on.
    rig.clock.base.advance(Nanos(50 * MS * 10));
    let (clock, chip) = (rig.clock.twin(), Recorder::new());
    let restored = Hpet::restore(
        &clock.queue,
        &(Arc::clone(&chip) as Arc<dyn IrqChip>),
        LegacyRouting::default(),
        TickConfig::default(),
        &state,
    )
    .unwrap();
    assert_eq!(chip.edges(GSI20), 1);
    assert_eq!(u64::from_le_bytes(read(&*restored, COUNTER)), 60 * MS);
}

#[test]
fn what_is_saved_goes_on_after_restore() {
    let rig = Rig::new();
    rig.put(CONFIG, 3);
    rig.periodic(MS, MS, 0);
    rig.put(config_of(0), ENABLE | LEVEL | PERIODIC | SET_VALUE);
    rig.put(comparator_of(0), MS);
    rig.put(comparator_of(0), MS);
    rig.run(MS + 10);
    let state: HpetState = rig.hpet.save();
    let clock = rig.clock.twin();
    let (chip, routing) = (Recorder::new(), LegacyRouting::default());
    let restored = Hpet::restore(
        &clock.queue,
        &(Arc::clone(&chip) as Arc<dyn IrqChip>),
        routing.clone(),
        TickConfig::default(),
        &state,
    )
    .unwrap();
    assert_eq!(restored.save(), state);
    assert!(routing.is_on() && chip.level(GSI_TIMER));
    clock.run(Nanos((MS - 11) * 10));
    assert_eq!(chip.edges(GSI20), 0);
    clock.run(Nanos(10));
    assert_eq!(chip.edges(GSI20), 1);
}

#[test]
fn linux_sets_a_periodic_narrow_timer() {
    let rig = Rig::new();
    rig.put32(CONFIG, 0);
    rig.put32(COUNTER, 0);
    rig.put32(COUNTER + 4, 0);
    rig.put32(CONFIG, 1);
    rig.run(12_345);
    rig.put32(config_of(2), (ENABLE | PERIODIC | SET_VALUE | NARROW | TO_20) as u32);
    rig.put32(comparator_of(2), 12_345 + 400_000);
    rig.run(100);
    rig.put32(comparator_of(2), 400_000);
    // Over the wrap of the low half, without a lost or an early tick.
    let periods = (1u64 << 32) / 400_000 + 10;
    rig.run(400_000 * periods - 100);
    assert_eq!(rig.edges() as u64, periods);
}

#[test]
fn hostile_values_neither_panic_nor_storm() {
    let rig = Rig::new();
    let values = [0, 1, u64::MAX, i64::MAX as u64, 1 << 63, 0xffff_ffff, 0x8000_0000, 0x14e, 0x4e];
    for first in values {
        for second in values {
            for offset in [CONFIG, COUNTER, 0x100, 0x108, 0x108, STATUS, 0x120, 0x128, CONFIG, 0x128] {
                rig.put(offset, first);
                rig.put(offset, second);
                rig.run(MIN_PERIOD_TICKS / 2);
            }
        }
    }
    let before = rig.chip.edges(GSI20);
    rig.run(1000 * MS);
    assert!(rig.chip.edges(GSI20) - before <= 3 * 10_001);
}
