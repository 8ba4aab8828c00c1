//! Every policy's state machine by tables, as Xen's `vpt.c` has it, and properties over random lives.

use super::{HANDLER, LOST, MAX_BACKLOG, OFF_BEAT, PREEMPTED, SHORTEST_SERVICE};
use crate::{Grid, Moment, Nanos, SLEW, Tick, TickConfig, TickPolicy};

const MS: u64 = 1_000_000;
const PERIOD: u64 = 10 * MS;

fn tick(policy: TickPolicy) -> Tick {
    let mut tick = Tick::new(TickConfig { policy, align: false });
    tick.start_periodic(Grid::of_nanos(Nanos(PERIOD), Nanos(PERIOD)));
    tick
}

fn at(ms: u64) -> Nanos {
    Nanos(ms * MS)
}

/// What happens at some moment, in ms, and what comes of it.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// The vCPU runs; the tick is offered: whether an interrupt is raised.
    Run(u64, bool),
    /// The vCPU sleeps in HLT, a due tick wakes it.
    Wake(u64, bool),
    /// The guest takes the interrupt: backlog and next point of the grid afterwards.
    Take(u64, u64, u64),
    /// The interrupt is refused: it is masked.
    Refuse,
    /// The guest unmasks it: backlog and next point afterwards.
    Unmask(u64, u64, u64),
}
use Event::{Refuse, Run, Take, Unmask, Wake};

fn play(policy: TickPolicy, events: &[Event]) -> Tick {
    let mut tick = tick(policy);
    for (step, event) in events.iter().enumerate() {
        let place = || format!("{policy}, step {step}: {event:?}, {tick:?}");
        match *event {
            Run(ms, raised) => assert_eq!(tick.clone().offer(at(ms), false), raised, "{}", place()),
            Wake(ms, raised) => assert_eq!(tick.clone().offer(at(ms), true), raised, "{}", place()),
            _ => {}
        }
        match *event {
            Run(ms, _) => drop(tick.offer(at(ms), false)),
            Wake(ms, _) => drop(tick.offer(at(ms), true)),
            Take(ms, backlog, next) => {
                tick.taken(at(ms));
                assert_eq!((tick.backlog(), tick.next()), (backlog, Some(at(next))), "{event:?} {tick:?}");
            }
            Refuse => tick.refuse(),
            Unmask(ms, backlog, next) => {
                tick.unmask(at(ms));
                assert_eq!((tick.backlog(), tick.next()), (backlog, Some(at(next))), "{event:?} {tick:?}");
            }
        }
    }
    tick
}

#[test]
fn on_time_every_policy_is_the_same() {
    for policy in TickPolicy::ALL {
        let tick = play(
            policy,
            &[
                Run(9, false),
                Run(10, true),
                Run(10, false), // raised already
                Take(10, 0, 20),
                Run(19, false),
                Wake(20, true),
                Take(20, 0, 30),
            ],
        );
        let counts = tick.counts();
        assert_eq!((counts.delivered, counts.missed, counts.replayed), (2, 0, 0), "{policy}");
    }
}

#[test]
fn after_a_gap_conserving_policies_give_back_every_tick() {
    // Preempted from before 10 to 45: the points 10, 20, 30, 40 passed.
    for policy in [TickPolicy::Delay, TickPolicy::Replay] {
        let tick = play(
            policy,
            &[
                Run(45, true),
                Take(45, 3, 50),
                Run(45, true),
                Take(45, 2, 50),
                Run(45, true),
                Take(45, 1, 50),
                Run(46, true),
                Take(46, 0, 50),
                Run(49, false),
                Run(50, true),
                Take(50, 0, 60),
            ],
        );
        let counts = tick.counts();
        assert_eq!((counts.delivered, counts.replayed, counts.missed), (5, 3, 0), "{policy}");
    }
}

#[test]
fn sync_gives_nothing_until_the_grid() {
    let tick = play(
        TickPolicy::Sync,
        &[
            Run(45, false), // 10 to 40 are lost
            Run(49, false),
            Run(58, false), // preempted again over 50
            Run(60, true),
            Take(60, 0, 70),
            Run(75, false), // the next gap is skipped again
            Run(80, true),
            Take(80, 0, 90),
        ],
    );
    assert_eq!((tick.counts().delivered, tick.counts().missed), (2, 6));
}

#[test]
fn sync_insists_when_there_was_none_for_long() {
    // A vCPU that always runs between two points.
    let mut steps: Vec<_> = (1..=11).map(|point| Run(10 * point + 5, false)).collect();
    steps.extend([Run(125, true), Take(125, 0, 130), Run(135, false)]);
    let tick = play(TickPolicy::Sync, &steps);
    assert_eq!((tick.counts().delivered, tick.counts().missed), (1, 12));
}

#[test]
fn late_one_gives_one_at_once_and_returns_to_the_grid() {
    let tick = play(
        TickPolicy::LateOne,
        &[Run(45, true), Take(45, 0, 50), Run(45, false), Run(50, true), Take(50, 0, 60)],
    );
    assert_eq!((tick.counts().delivered, tick.counts().missed), (2, 3));
}

#[test]
fn async_gives_one_at_once_and_begins_a_new_grid() {
    let tick = play(
        TickPolicy::Async,
        &[Run(45, true), Take(45, 0, 55), Run(50, false), Run(55, true), Take(55, 0, 65)],
    );
    assert_eq!((tick.counts().delivered, tick.counts().missed), (2, 3));
}

#[test]
fn a_vcpu_that_slept_was_not_preempted() {
    // However late the wake-up is, the tick that caused it comes; what else passed is the policy's affair.
    let [replay, sync, late] = [TickPolicy::Replay, TickPolicy::Sync, TickPolicy::LateOne].map(|policy| {
        let mut tick = tick(policy);
        assert!(tick.offer(at(35), true), "{policy}");
        tick.taken(at(35));
        (tick.backlog(), tick.next(), tick.counts().missed)
    });
    assert_eq!(replay, (2, Some(at(40)), 0));
    assert_eq!(sync, (0, Some(at(40)), 2));
    assert_eq!(late, (0, Some(at(40)), 2));
}

#[test]
fn a_guest_that_takes_its_time_collapses_or_collects() {
    // Raised at 10, taken at 38 because the guest had interrupts off; 20 and 30 passed meanwhile.
    let after = |policy| {
        let mut tick = tick(policy);
        assert!(tick.offer(at(10), false));
        tick.taken(at(38));
        (tick.backlog(), tick.next())
    };
    for policy in TickPolicy::ALL {
        let expected = match policy {
            TickPolicy::Async => (0, Some(at(48))),
            policy if policy.conserves() => (2, Some(at(40))),
            _ => (0, Some(at(40))),
        };
        assert_eq!(after(policy), expected, "{policy}");
    }
}

#[test]
fn masked_lines_suspend_conserving_policies_and_lose_ticks_otherwise() {
    for policy in [TickPolicy::Delay, TickPolicy::Replay, TickPolicy::ReplaySlew] {
        let tick = play(
            policy,
            &[Run(10, true), Refuse, Run(30, false), Unmask(35, 1, 20), Run(35, true), Take(35, 2, 40)],
        );
        assert_eq!(tick.counts().masked, 0, "{policy}");
    }
    for policy in [TickPolicy::Sync, TickPolicy::LateOne] {
        let tick = play(policy, &[Run(10, true), Refuse, Unmask(35, 0, 40), Run(35, false), Run(40, true)]);
        assert_eq!(tick.counts().masked, 3, "{policy}");
        assert_eq!(tick.deadline(), Some(at(40).saturating_add(LOST)));
    }
    let mut once = Tick::stopped();
    once.start_once(at(5));
    assert!(once.offer(at(5), false));
    once.refuse();
    once.unmask(at(6));
    assert!(!once.is_running() && !once.offer(at(7), false), "an edge on a masked input is lost");
}

#[test]
fn slew_replays_at_a_bounded_rate() {
    let mut tick = tick(TickPolicy::ReplaySlew);
    assert!(tick.offer(at(45), false));
    tick.taken(at(45));
    let mut now = at(45);
    for left in (0..3).rev() {
        assert!(!tick.offer(now, false), "not back to back");
        let next = now.saturating_add(Nanos(PERIOD / SLEW));
        assert_eq!(tick.deadline(), Some(next));
        assert!(!tick.offer(next.saturating_sub(Nanos(1)), false));
        assert!(tick.offer(next, false));
        tick.taken(next);
        now = next;
        assert_eq!(tick.backlog(), left);
    }
    assert_eq!(tick.next(), Some(at(50)));
}

#[test]
fn delay_holds_guest_time_at_the_tick_that_is_delivered() {
    let mut tick = tick(TickPolicy::Delay);
    assert_eq!(tick.apparent(), None);
    assert!(tick.offer(at(35), false));
    assert_eq!(tick.apparent(), Some((at(10), true)), "back to the first tick that is owed");
    tick.taken(at(35));
    assert!(tick.offer(at(35), false));
    assert_eq!(tick.apparent(), Some((at(20), false)), "then forward, tick by tick");
    tick.taken(at(35));
    assert!(tick.offer(at(35), false));
    assert_eq!(tick.apparent(), Some((at(30), false)));
    tick.taken(at(35));
    assert!(tick.offer(at(40), false));
    assert_eq!(tick.apparent(), Some((at(40), false)), "up with time again");
    for policy in TickPolicy::ALL.into_iter().filter(|policy| *policy != TickPolicy::Delay) {
        let mut other = self::tick(policy);
        let _ = other.offer(at(35), true);
        assert_eq!(other.apparent(), None);
    }
}

#[test]
fn the_backlog_is_bounded_in_time() {
    for policy in [TickPolicy::Delay, TickPolicy::Replay, TickPolicy::ReplaySlew] {
        let mut tick = tick(policy);
        let most = MAX_BACKLOG.0 / PERIOD;
        assert!(tick.offer(Nanos(PERIOD * most), false));
        assert_eq!((tick.backlog(), tick.counts().stepped), (most, 0), "{policy}: exactly the bound is kept");
        let mut tick = self::tick(policy);
        assert!(tick.offer(Nanos(PERIOD * (most + 1)), false));
        assert_eq!(
            (tick.backlog(), tick.counts().stepped),
            (1, most),
            "{policy}: one more and it steps, once"
        );
        assert_eq!(tick.next(), Some(Nanos(PERIOD * (most + 2))), "{policy}: the grid stays");
    }
}

#[test]
fn one_shots_come_once_and_late_ones_at_once() {
    for policy in TickPolicy::ALL {
        let mut tick = Tick::new(TickConfig { policy, align: true });
        tick.start_once(at(7));
        assert_eq!((tick.next(), tick.deadline()), (Some(at(7)), Some(at(7))));
        assert!(!tick.offer(at(6), false) && tick.is_due(at(7)));
        assert!(tick.offer(at(5000), false), "{policy}: however late");
        assert_eq!(tick.next(), None);
        tick.taken(at(5000));
        assert!(!tick.is_running() && !tick.offer(at(6000), false));
        assert_eq!(tick.counts().delivered, 1);
    }
}

#[test]
fn an_interrupt_that_a_controller_lost_comes_again() {
    let mut tick = tick(TickPolicy::LateOne);
    assert!(tick.offer(at(10), false));
    let again = at(10).saturating_add(LOST);
    assert_eq!(tick.deadline(), Some(again));
    assert!(!tick.offer(again.saturating_sub(Nanos(1)), false));
    assert!(tick.offer(again, false));
    tick.taken(again);
    assert_eq!(tick.counts().delivered, 1);
}

#[test]
fn alignment_rounds_the_first_point_up() {
    let start = |align| {
        let mut tick = Tick::new(TickConfig { policy: TickPolicy::LateOne, align });
        tick.start_periodic(Grid::of_nanos(at(13), at(10)));
        tick.next()
    };
    assert_eq!((start(false), start(true)), (Some(at(13)), Some(at(20))));
    // A guest may set a timer to the end of time.
    let mut never = Tick::new(TickConfig { policy: TickPolicy::LateOne, align: true });
    never.start_periodic(Grid { hz: 100_000_000, first: u64::MAX - 1, every: 1000 });
    assert_eq!(never.next(), Some(Nanos(u64::MAX)));
}

#[test]
fn a_grid_does_not_round_up_over_time() {
    // 1193182 Hz divided by 11932 is no whole number of nanoseconds.
    let grid = Grid { hz: 1_193_182, first: 11_932, every: 11_932 };
    let mut tick = Tick::stopped();
    tick.start_periodic(grid);
    let hour = Nanos(3600 * Nanos::SECOND.0);
    let mut ticks = 0u64;
    while let Some(next) = tick.next().filter(|next| *next <= hour) {
        assert!(tick.offer(next, false));
        tick.taken(next);
        ticks += 1;
    }
    assert_eq!(ticks, hour.to_ticks(grid.hz) / grid.every);
    assert_eq!(tick.next(), Some(Nanos::from_ticks((ticks + 1) * grid.every, grid.hz)));
}

#[test]
fn a_late_start_has_one_tick_due() {
    let mut tick = Tick::stopped();
    tick.start_late(Grid::of_nanos(at(30), at(10)));
    assert!(tick.is_due(at(21)) && tick.offer(at(21), false));
    tick.taken(at(21));
    assert_eq!((tick.next(), tick.backlog()), (Some(at(30)), 0));
}

#[test]
fn nobody_listens() {
    let mut tick = tick(TickPolicy::Replay);
    assert!(!tick.skip(at(9)) && tick.skip(at(35)) && !tick.skip(at(39)));
    assert_eq!((tick.next(), tick.backlog(), tick.counts()), (Some(at(40)), 0, Default::default()));
    tick.start_once(at(50));
    assert!(tick.skip(at(50)) && !tick.is_running());
}

#[test]
fn a_short_period_does_not_flood_the_timer_thread() {
    let mut tick = Tick::stopped();
    tick.start_periodic(Grid::of_nanos(Nanos(1), Nanos(1)));
    assert!(tick.offer(at(1), false));
    tick.taken(at(1));
    assert_eq!(tick.deadline(), Some(at(1).saturating_add(SHORTEST_SERVICE)));
}

/// A small generator, so that every run is the same.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[test]
fn random_lives_keep_every_promise() {
    for policy in TickPolicy::ALL {
        for seed in 1..=300u64 {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let grid = match random.below(3) {
                0 => Grid::of_nanos(Nanos(random.below(PERIOD)), Nanos(MS + random.below(PERIOD))),
                1 => Grid { hz: 1_193_182, first: random.below(99_999), every: 1193 + random.below(60_000) },
                _ => Grid { hz: 32_768, first: random.below(99), every: 32 << random.below(5) },
            };
            let mut tick = Tick::new(TickConfig { policy, align: false });
            tick.start_periodic(grid);
            let points = |now: Nanos| {
                now.to_ticks(grid.hz).checked_sub(grid.first).map_or(0, |passed| passed / grid.every + 1)
            };
            let mut now = Nanos(0);
            for _ in 0..400 {
                // Mostly short steps, now and then the host takes the processor away.
                let gap = if random.below(8) == 0 { random.below(300 * MS) } else { random.below(3 * MS) };
                now = now.saturating_add(Nanos(gap));
                let slept = random.below(4) == 0;
                if tick.offer(now, slept) {
                    now = now.saturating_add(Nanos(random.below(2 * MS)));
                    tick.taken(now);
                }
                let counts = tick.counts();
                let place = || format!("{policy}, seed {seed}, {now:?}: {tick:?}");
                // No tick ever comes early: not more were delivered than points have passed.
                let due = points(now);
                assert!(policy == TickPolicy::Async || counts.delivered <= due, "{}", place());
                if policy.conserves() {
                    // Every point that the tick has looked at was delivered or is owed.
                    let seen = points(tick.next().unwrap().saturating_sub(Nanos(1)));
                    assert_eq!(counts.delivered + tick.backlog() + counts.stepped, seen, "{}", place());
                }
                if matches!(policy, TickPolicy::Sync | TickPolicy::LateOne) {
                    assert!(counts.delivered + counts.missed <= due + 1, "{}", place());
                    assert!(tick.backlog() <= 1 || tick.is_raised(), "{}", place());
                }
                if policy != TickPolicy::Async {
                    // The next point is one of the grid.
                    let next = tick.next().unwrap().to_ticks(grid.hz);
                    assert_eq!((next - grid.first) % grid.every, 0, "{}", place());
                }
            }
            // When the host lets the guest run, every debt is paid within the backlog's own time.
            for _ in 0..2_000_000 {
                let Some(deadline) = tick.deadline() else { break };
                if tick.backlog() == 0 && tick.next().is_some_and(|next| next > now) {
                    break;
                }
                now = now.max(deadline);
                if tick.offer(now, false) {
                    tick.taken(now);
                }
            }
            assert_eq!(tick.backlog(), 0, "{policy}, seed {seed}");
            if policy.conserves() {
                assert_eq!(tick.counts().delivered + tick.counts().stepped, points(now), "{policy}, {seed}");
            }
        }
    }
}

/// The vCPU's thread took a tick, ran for a while, was away until the next point, and is punctual there: it may be
/// between that interrupt and the reading of its clocks.
#[test]
fn sync_skips_a_tick_that_the_handler_of_the_last_one_may_see() {
    const ENOUGH: u64 = if HANDLER.0 < PERIOD / 4 { HANDLER.0 } else { PERIOD / 4 };
    let moment = |line, ran| Moment { line: Nanos(line), ran: Some(Nanos(ran)) };
    for (policy, ran, offered) in [
        (TickPolicy::Sync, ENOUGH - 1, false),
        (TickPolicy::Sync, ENOUGH, true),
        (TickPolicy::LateOne, 0, true),
        (TickPolicy::Replay, 0, true),
    ] {
        let mut tick = tick(policy);
        assert!(tick.offer(moment(PERIOD, 7), false), "no tick before it is handled");
        tick.taken(moment(PERIOD, 7));
        assert_eq!(tick.offer(moment(2 * PERIOD, 7 + ran), false), offered, "{policy} {ran}");
        if offered {
            continue;
        }
        assert_eq!(tick.counts().missed, 1);
        // Still there at the next point; out of it; asleep, so in no handler.
        let [mut still, mut out, mut asleep] = [tick; 3];
        assert!(!still.offer(moment(3 * PERIOD, 7 + ran), false));
        assert!(out.offer(moment(3 * PERIOD, 7 + ENOUGH), false));
        assert!(asleep.offer(moment(3 * PERIOD, 7 + ran), true));
    }
    // Taken late after a sleep, shortly before the next point; perhaps asleep again when that is looked at.
    for slept in [false, true] {
        let mut tick = tick(TickPolicy::Sync);
        let late = 2 * PERIOD - ENOUGH / 2;
        assert!(tick.offer(Nanos(late), true));
        tick.taken(Nanos(late));
        assert!(!tick.offer(Nanos(2 * PERIOD), slept));
        assert!(tick.offer(Nanos(3 * PERIOD), slept));
    }
}

#[test]
fn lateness_decides_what_preemption_is() {
    let mut tick = tick(TickPolicy::Sync);
    assert!(tick.offer(Nanos(PERIOD + OFF_BEAT.0), false), "the edge of it is on time");
    tick.taken(Nanos(PERIOD + OFF_BEAT.0));
    assert!(!tick.offer(Nanos(2 * PERIOD + OFF_BEAT.0 + 1), false));
    for (late, preempted) in [(PREEMPTED.0, false), (PREEMPTED.0 + 1, true)] {
        let mut tick = self::tick(TickPolicy::Delay);
        assert!(tick.offer(Nanos(PERIOD + late), false));
        assert_eq!(tick.apparent(), Some((Nanos(PERIOD), preempted)));
    }
}
