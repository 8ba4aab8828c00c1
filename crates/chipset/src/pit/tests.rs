use std::sync::Arc;

use wardian_bus::Device;
use wardian_irq::{Awaited, Gsi};
use wardian_state::Refused;
use wardian_time::{Nanos, RunState, TickConfig, TickPolicy};

use super::{CountingState, LatchState, NextCountState, PIT_HZ, Pit, PitState};
use crate::testing::twin::{self, Random, Twin};
use crate::testing::{Clock, at, read};
use crate::wire::tests::Recorder;

struct Board {
    clock: Clock,
    pit: Arc<Pit>,
    chip: Arc<Recorder>,
}

impl Board {
    fn new() -> Board {
        let (clock, chip) = (Clock::new(), Recorder::new());
        let pit = Pit::new(&clock.queue, chip.line(Gsi(0)), TickConfig::default());
        Board { clock, pit, chip }
    }

    fn out(&self, port: u64, value: u8) {
        self.pit.write(at(port - 0x40), &[value]);
    }

    fn inb(&self, port: u64) -> u8 {
        read::<1>(&*self.pit, port - 0x40)[0]
    }

    fn set(&self, channel: u64, mode: u8, count: u16) {
        self.out(0x43, (channel as u8) << 6 | 0x30 | mode << 1);
        self.out(0x40 + channel, count as u8);
        self.out(0x40 + channel, (count >> 8) as u8);
    }

    /// Latches and reads a count.
    fn count(&self, channel: u64) -> u16 {
        self.out(0x43, (channel as u8) << 6);
        u16::from_le_bytes([self.inb(0x40 + channel), self.inb(0x40 + channel)])
    }

    fn status(&self, channel: u64) -> u8 {
        self.out(0x43, 0xe0 | 2 << channel);
        self.inb(0x40 + channel)
    }

    /// Runs until the clock's tick `ticks` after time 0.
    fn until(&self, ticks: u64) {
        let at = Nanos::from_ticks(ticks, PIT_HZ);
        self.clock.run(at.saturating_sub(self.clock.base.now()));
    }

    fn edges(&self) -> usize {
        self.chip.edges(Gsi(0))
    }
}

#[test]
fn mode_0_counts_through_and_interrupts_once() {
    let board = Board::new();
    board.out(0x43, 0x30);
    assert_eq!(board.status(0), 0x70, "output low, null count");
    board.out(0x40, 100);
    board.out(0x40, 0);
    assert_eq!(board.status(0), 0x30);
    board.until(40);
    assert_eq!((board.count(0), board.edges()), (60, 0));
    board.until(99);
    assert_eq!((board.count(0), board.status(0) >> 7, board.edges()), (1, 0, 0));
    board.until(100);
    assert_eq!((board.count(0), board.status(0) >> 7, board.edges()), (0, 1, 1));
    board.until(103);
    assert_eq!(board.count(0), 0xfffd);
    board.until(200_000);
    assert_eq!(board.edges(), 1);
}

#[test]
fn mode_2_ticks_on_an_exact_grid() {
    let board = Board::new();
    board.set(0, 2, 11932);
    board.until(11931);
    assert_eq!((board.count(0), board.edges(), board.status(0) >> 7), (1, 0, 0));
    board.until(11932);
    assert_eq!((board.count(0), board.edges(), board.status(0) >> 7), (11932, 1, 1));
    // An hour without drift against the clock that drives it.
    board.clock.run(Nanos(3600 * 1_000_000_000));
    assert_eq!(board.edges() as u64, board.clock.base.now().to_ticks(PIT_HZ) / 11932);
}

#[test]
fn a_late_tick_comes_once_and_the_grid_stays() {
    let board = Board::new();
    board.set(0, 2, 1000);
    board.clock.base.advance(Nanos::from_ticks(3500, PIT_HZ));
    board.clock.queue.run_due();
    assert_eq!(board.edges(), 1);
    board.until(3999);
    assert_eq!(board.edges(), 1);
    board.until(4000);
    assert_eq!(board.edges(), 2);
}

#[test]
fn a_new_count_in_mode_2_waits_for_the_period() {
    let board = Board::new();
    board.set(0, 2, 100);
    board.until(50);
    board.out(0x40, 0);
    board.out(0x40, 1);
    assert_eq!(board.status(0) & 0x40, 0x40);
    assert_eq!(board.count(0), 50);
    board.until(100);
    assert_eq!((board.count(0), board.edges(), board.status(0) & 0x40), (256, 1, 0));
    board.until(355);
    assert_eq!(board.edges(), 1);
    board.until(356);
    assert_eq!(board.edges(), 2);
}

#[test]
fn mode_3_is_a_square_wave() {
    let board = Board::new();
    board.set(0, 3, 10);
    let mut seen = Vec::new();
    for tick in 0..10 {
        board.until(tick);
        seen.push((board.count(0), board.status(0) >> 7));
    }
    let half = [10, 8, 6, 4, 2];
    let expected: Vec<_> = half.map(|n| (n, 1)).into_iter().chain(half.map(|n| (n, 0))).collect();
    assert_eq!(seen, expected);
    board.set(0, 3, 0); // 18.2 Hz
    let start = board.clock.base.now().to_ticks(PIT_HZ);
    let before = board.edges();
    board.until(start + 65536 * 10);
    assert_eq!(board.edges() - before, 10);
}

#[test]
fn mode_4_strobes_once_as_linux_uses_it_for_one_shots() {
    let board = Board::new();
    board.set(0, 4, 1000);
    board.until(1000);
    assert_eq!((board.status(0) >> 7, board.edges()), (0, 0));
    board.until(1001);
    assert_eq!((board.status(0) >> 7, board.edges()), (1, 1));
    board.out(0x40, 0xe8); // a new count alone starts the next
    board.out(0x40, 0x03);
    board.until(2002);
    assert_eq!(board.edges(), 2);
    board.until(100_000);
    assert_eq!(board.edges(), 2);
    board.out(0x43, 0x38);
    board.until(200_000);
    assert_eq!(board.edges(), 2, "a control word alone stops it");
}

#[test]
fn the_shortest_period_does_not_flood() {
    let board = Board::new();
    board.set(0, 2, 1);
    board.clock.run(Nanos(1_000_000));
    assert!((40..=51).contains(&board.edges()), "{}", board.edges());
}

#[test]
fn gates_hold_restart_and_trigger_channel_2() {
    let board = Board::new();
    let port61 = board.pit.port61();
    let gate = |on: u8| port61.write(at(0), &[on]);
    board.set(2, 0, 1000);
    board.until(100);
    assert_eq!(board.count(2), 1000, "gate low: held");
    gate(1);
    board.until(300);
    assert_eq!(board.count(2), 800);
    gate(0);
    board.until(500);
    assert_eq!(board.count(2), 800);
    gate(3);
    board.until(600);
    assert_eq!(board.count(2), 700);
    assert_eq!(read::<1>(&*port61, 0)[0] & 0x2f, 3);
    board.until(1300);
    assert_eq!(read::<1>(&*port61, 0)[0] & 0x2f, 0x23, "output high");

    gate(0);
    board.set(2, 1, 50); // retriggerable one-shot
    assert_eq!(board.status(2) >> 6, 3, "output high, count waits for the trigger");
    gate(1);
    assert_eq!(board.status(2) >> 6, 0);
    board.until(1340);
    gate(0);
    gate(1);
    board.until(1389);
    assert_eq!(board.status(2) >> 7, 0);
    board.until(1390);
    assert_eq!(board.status(2) >> 7, 1);

    board.set(2, 5, 10);
    gate(0);
    gate(1);
    board.until(1400);
    assert_eq!(board.status(2) >> 7, 0);
    board.until(1401);
    assert_eq!(board.status(2) >> 7, 1);

    board.set(2, 3, 100);
    board.until(1430);
    gate(0);
    assert_eq!(board.status(2) >> 7, 1);
    gate(1);
    assert_eq!(board.count(2), 100, "the gate restarts it");
}

#[test]
fn linux_quick_calibration_sees_every_high_byte() {
    let board = Board::new();
    let port61 = board.pit.port61();
    port61.write(at(0), &[1]);
    board.out(0x43, 0xb0);
    board.out(0x42, 0xff);
    board.out(0x42, 0xff);
    let start = board.clock.base.now();
    board.inb(0x42);
    assert_eq!(board.inb(0x42), 0xff);
    for high in (0xf0..0xff).rev() {
        while {
            board.inb(0x42);
            board.inb(0x42) != high
        } {
            board.clock.run(Nanos(1000));
            let spent = board.clock.base.now().saturating_sub(start);
            assert!(spent < Nanos(5_000_000), "{high:#x} did not come");
        }
    }
    let spent = board.clock.base.now().saturating_sub(start).0;
    assert!(spent.abs_diff(15 * 256 * 1_000_000_000 / PIT_HZ) < 2000, "{spent}");
}

#[test]
fn refresh_bit_toggles() {
    let board = Board::new();
    let port61 = board.pit.port61();
    let bit = || read::<1>(&*port61, 0)[0] & 0x10;
    let first = bit();
    board.clock.run(Nanos(15_100));
    assert_ne!(bit(), first);
}

#[test]
fn byte_access_modes_latches_and_bcd() {
    let board = Board::new();
    board.out(0x43, 0x10 | 4); // low byte only, mode 2
    board.out(0x40, 200);
    board.until(50);
    assert_eq!((board.inb(0x40), board.inb(0x40)), (150, 150));
    board.out(0x43, 0x20 | 4); // high byte only
    board.out(0x40, 2);
    assert_eq!(board.inb(0x40), 2);
    board.out(0x43, 0x31 | 4); // both, decimal
    board.out(0x40, 0x34);
    board.out(0x40, 0x12);
    assert_eq!(board.count(0), 0x1234);
    let start = board.clock.base.now().to_ticks(PIT_HZ);
    board.until(start + 35);
    assert_eq!(board.count(0), 0x1199);
    // Status and count latched together: status first; a second latch does not replace the first.
    board.out(0x43, 0xc2);
    board.until(start + 40);
    board.out(0x43, 0xc2);
    assert_eq!(board.inb(0x40), 0xb5);
    assert_eq!((board.inb(0x40), board.inb(0x40)), (0x99, 0x11));
    board.out(0x43, 0x31);
    board.out(0x40, 0xff); // no decimal digits
    board.out(0x40, 0xff);
    let _ = board.count(0);
    board.pit.write(at(0), &[1, 2, 3, 4]);
    assert_eq!(read::<4>(&*board.pit, 0)[3], 0xff);
    assert!(board.pit.inspect().iter().any(|(name, _)| name == "channel0"));
}

/// A PIT with a recorder, or in a whole set of chips.
struct PitTwin {
    clock: Clock,
    chip: Arc<Recorder>,
    pit: Arc<Pit>,
    ticks: TickConfig,
}

impl PitTwin {
    fn parts(random: &mut Random) -> (Clock, Arc<Recorder>, TickConfig) {
        let policies = [
            TickPolicy::LateOne,
            TickPolicy::Replay,
            TickPolicy::ReplaySlew,
            TickPolicy::Sync,
            TickPolicy::Async,
        ];
        (
            Clock::new(),
            Recorder::new(),
            TickConfig { policy: random.one_of(&policies), align: random.once_in(2) },
        )
    }
}

impl Twin for PitTwin {
    type State = PitState;

    fn fresh(random: &mut Random) -> PitTwin {
        let (clock, chip, ticks) = PitTwin::parts(random);
        let pit = Pit::new(&clock.queue, chip.line(Gsi(2)), ticks);
        PitTwin { clock, chip, pit, ticks }
    }

    fn restored(other: &PitTwin, state: &PitState) -> Result<PitTwin, Refused> {
        let (clock, chip) = (other.clock.twin(), Recorder::new());
        let pit = Pit::restore(&clock.queue, chip.line(Gsi(2)), other.ticks, state)?;
        Ok(PitTwin { clock, chip, pit, ticks: other.ticks })
    }

    fn save(&self) -> PitState {
        self.chip.news();
        self.pit.save()
    }

    fn clock(&self) -> &Clock {
        &self.clock
    }

    fn live(&self, random: &mut Random) -> String {
        let mut data = [0; 1];
        let port = random.below(4);
        match random.below(8) {
            0..3 => self.pit.read(at(port), &mut data),
            3 => self.pit.port61().read(at(0), &mut data),
            4 => self.pit.port61().write(at(0), &[random.next() as u8]),
            5 => self.pit.write(at(3), &[random.next() as u8]),
            _ => self
                .pit
                .write(at(port), &[random.one_of(&[0, 1, 2, 0x12, 0x40, random.clone().next() as u8])]),
        }
        format!("{data:?} {:?}", self.chip.news())
    }

    fn raised(&self) -> Vec<u32> {
        self.chip.high()
    }
}

#[test]
fn a_restored_pit_lives_on() {
    twin::lives_on::<PitTwin>(150);
    twin::is_not_upset::<PitTwin>(60);
    twin::restores_golden::<PitTwin>(|state| state.saved_at_ns);
}

#[test]
fn impossible_states_are_refused_by_name() {
    let mut random = Random::new(1);
    let one = PitTwin::fresh(&mut random);
    one.pit.write(at(3), &[0x34]);
    one.pit.write(at(0), &[0x00]);
    one.pit.write(at(0), &[0x10]);
    one.clock.run(Nanos(5_000_000));
    let refusal = |change: fn(&mut PitState)| twin::refusal(&one, change);
    assert_eq!(refusal(|_| ()), "taken");
    assert_eq!(refusal(|s| s.saved_at_ns += 1), "saved_at_ns");
    assert_eq!(refusal(|s| s.port_61 = 0x10), "port_61");
    assert_eq!(refusal(|s| s.channels[1].mode = 6), "channels[1].mode");
    assert_eq!(refusal(|s| s.channels[0].reload = 0), "channels[0].reload");
    assert_eq!(refusal(|s| s.channels[2].reload = 0x1_0001), "channels[2].reload");
    assert_eq!(
        refusal(|s| s.channels[0].counting = CountingState::Since(6_000)),
        "channels[0].counting.since"
    );
    assert_eq!(refusal(|s| s.channels[0].counting = CountingState::Held(1)), "channels[0].counting.held");
    assert_eq!(
        refusal(|s| s.channels[0].latch = Some(LatchState { count: 1, bytes_left: 3 })),
        "channels[0].latch.bytes_left"
    );
    assert_eq!(
        refusal(|s| s.channels[0].next = Some(NextCountState { at_tick: Some(1 << 40), count: 9 })),
        "channels[0].next.at_tick"
    );
    assert_eq!(refusal(|s| s.tick.run = RunState::Stopped), "tick.run");
    assert_eq!(
        refusal(|s| s.tick.run = RunState::Periodic { clock_hz: 1, first: 0, every: 0x1000, next: 0 }),
        "tick.run.clock_hz"
    );
    assert_eq!(refusal(|s| s.tick.backlog = 1 << 40), "tick.backlog");
    assert_eq!(
        refusal(|s| s.link.awaited = Some(Awaited { vector: None, isa: Some(16) })),
        "link.awaited.isa"
    );
}
