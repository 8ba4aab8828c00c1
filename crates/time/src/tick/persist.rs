//! What is saved of a [`Tick`].

use serde::{Deserialize, Serialize};
use wardian_state::check::{Wrong, at_most, ensure};

use super::{Grid, MAX_BACKLOG, Run, SHORTEST_SERVICE, Tick, TickCounts};
use crate::policy::{SLEW, TickConfig};
use crate::{Nanos, TimeBase};

/// No clock of a timer is faster.
const MAX_HZ: u64 = Nanos::SECOND.0;
/// No count of a saved tick is higher: what is counted after it does not overflow.
const MAX_COUNT: u64 = 1 << 62;

/// A [`Tick`] as it is saved: a part of the timer's own record. Times are points of the time line in ns; how ticks
/// are treated is the machine's configuration and not in here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TickState {
    /// When it is due.
    pub run: RunState,
    /// Ticks that came due and are not taken, the one that waits among them.
    pub backlog: u64,
    /// Since when an interrupt is raised and not taken.
    pub raised_at_ns: Option<u64>,
    /// The guest masks it.
    pub masked: bool,
    /// The next one counts however late it comes (sync policy).
    pub insists: bool,
    /// When the guest took one last, or skipping began (sync policy).
    pub taken_at_ns: Option<u64>,
    /// The one that is raised came due while the vCPU did not run.
    pub preempted: bool,
    /// No interrupt before this (replay-slew policy).
    pub not_before_ns: u64,
    /// Not served by a timer thread before this.
    pub rest_until_ns: u64,
    /// What happened so far.
    pub counts: TickCountsState,
}

/// When a saved tick is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Never.
    #[default]
    Stopped,
    /// Once.
    Once {
        /// Then.
        at_ns: u64,
    },
    /// Again and again, see [`Grid`].
    Periodic {
        /// Clock of the timer in Hz.
        clock_hz: u64,
        /// First tick, in periods of that clock.
        first: u64,
        /// Periods of that clock between ticks.
        every: u64,
        /// Number of the next one, from 0 on.
        next: u64,
    },
}

/// [`TickCounts`] as they are saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TickCountsState {
    /// Interrupts that the guest took.
    pub delivered: u64,
    /// Of those, the ones that made up for missed ticks.
    pub replayed: u64,
    /// Ticks that no interrupt stands for.
    pub missed: u64,
    /// Ticks that came due while the guest masked them.
    pub masked: u64,
    /// Interrupts that merged with one that waited already.
    pub coalesced: u64,
    /// Ticks given up because the backlog was too long.
    pub stepped: u64,
    /// Longest time from due to taken, in ns.
    pub latest_ns: u64,
}

impl TickCountsState {
    fn of(counts: &TickCounts) -> TickCountsState {
        let most = |count: u64| count.min(MAX_COUNT);
        TickCountsState {
            delivered: most(counts.delivered),
            replayed: most(counts.replayed),
            missed: most(counts.missed),
            masked: most(counts.masked),
            coalesced: most(counts.coalesced),
            stepped: most(counts.stepped),
            latest_ns: counts.latest.0,
        }
    }

    fn counts(&self) -> Result<TickCounts, Wrong> {
        let TickCountsState { delivered, replayed, missed, masked, coalesced, stepped, latest_ns } = *self;
        let named = [
            ("delivered", delivered),
            ("replayed", replayed),
            ("missed", missed),
            ("masked", masked),
            ("coalesced", coalesced),
            ("stepped", stepped),
        ];
        for (name, count) in named {
            at_most(name, count, MAX_COUNT).map_err(|e| e.within("counts"))?;
        }
        Ok(TickCounts { delivered, replayed, missed, masked, coalesced, stepped, latest: Nanos(latest_ns) })
    }
}

impl RunState {
    fn of(run: &Run) -> RunState {
        match *run {
            Run::Stopped => RunState::Stopped,
            Run::Once(at) => RunState::Once { at_ns: at.0 },
            Run::Periodic { grid: Grid { hz, first, every }, next } => {
                RunState::Periodic { clock_hz: hz, first, every, next }
            }
        }
    }

    fn run(&self) -> Result<Run, Wrong> {
        match *self {
            RunState::Stopped => Ok(Run::Stopped),
            RunState::Once { at_ns } => Ok(Run::Once(Nanos(at_ns))),
            RunState::Periodic { clock_hz, first, every, next } => {
                ensure((1..=MAX_HZ).contains(&clock_hz), "run.clock_hz", || {
                    format!("{clock_hz} Hz is the rate of no timer")
                })?;
                at_most("run.next", next, MAX_COUNT)?;
                Ok(Run::Periodic { grid: Grid { hz: clock_hz, first, every }, next })
            }
        }
    }

    /// Periods of a clock of `clock_hz` between ticks; `None` if it is not periodic.
    ///
    /// # Errors
    /// When it is periodic by another clock.
    pub fn every(&self, clock_hz: u64) -> Result<Option<u64>, Wrong> {
        match *self {
            RunState::Periodic { clock_hz: own, every, .. } => {
                ensure(own == clock_hz, "run.clock_hz", || format!("{own} Hz, where it is {clock_hz}"))?;
                Ok(Some(every))
            }
            _ => Ok(None),
        }
    }
}

/// `field` of a state that was saved at `saved_at_ns` of the time line is wrong if `base` is not there yet: a device
/// that counts in guest time is restored after the clock that it counts by. So the guest's TSC is there before a
/// deadline in it.
///
/// # Errors
/// When the base is behind.
pub fn not_before_saved(field: &str, saved_at_ns: u64, base: &TimeBase) -> Result<(), Wrong> {
    let now = base.timeline().0;
    ensure(saved_at_ns <= now, field, || {
        format!(
            "{saved_at_ns} ns of guest time have not come, the clock stands at {now} ns: it is restored first"
        )
    })
}

impl Tick {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> TickState {
        TickState {
            run: RunState::of(&self.run),
            backlog: self.backlog,
            raised_at_ns: self.raised.map(|at| at.0),
            masked: self.masked,
            insists: self.insist,
            taken_at_ns: self.took.map(|at| at.line.0),
            preempted: self.preempted,
            not_before_ns: self.not_before.0,
            rest_until_ns: self.rest.0,
            counts: TickCountsState::of(&self.counts),
        }
    }

    /// The tick that was saved as `state`, treated as `config` says, at `now` of the time line. It is the same
    /// whatever the time: points that have passed meanwhile are due, and the policy says what becomes of them.
    ///
    /// # Errors
    /// When a tick cannot be in that state.
    pub fn restore(config: TickConfig, state: &TickState, now: Nanos) -> Result<Tick, Wrong> {
        let run = state.run.run()?;
        let most = match run {
            Run::Stopped => 0,
            Run::Once(_) => 1,
            Run::Periodic { grid, .. } => (MAX_BACKLOG.0 / grid.period().0.max(1)).max(1),
        };
        at_most("backlog", state.backlog, most)?;
        if let Some(raised) = state.raised_at_ns {
            at_most("raised_at_ns", raised, now.0)?;
            ensure(state.backlog > 0, "raised_at_ns", || "no tick waits")?;
            ensure(!state.masked, "raised_at_ns", || "the interrupt is masked")?;
        }
        at_most("taken_at_ns", state.taken_at_ns.unwrap_or(0), now.0)?;
        let slew = match run {
            Run::Periodic { grid, .. } => now.saturating_add(Nanos(grid.period().0 / SLEW)).0,
            _ => 0,
        };
        at_most("not_before_ns", state.not_before_ns, slew)?;
        at_most("rest_until_ns", state.rest_until_ns, now.saturating_add(SHORTEST_SERVICE).0)?;
        Ok(Tick {
            config,
            run,
            backlog: state.backlog,
            raised: state.raised_at_ns.map(Nanos),
            masked: state.masked,
            insist: state.insists,
            took: state.taken_at_ns.map(|at| Nanos(at).into()),
            preempted: state.preempted,
            not_before: Nanos(state.not_before_ns),
            rest: Nanos(state.rest_until_ns),
            counts: state.counts.counts()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_COUNT, RunState, TickState};
    use crate::{Grid, Nanos, Tick, TickConfig, TickPolicy};

    /// A small generator (splitmix64), the same on every run.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut x = self.0;
            x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ x >> 31
        }

        fn below(&mut self, end: u64) -> u64 {
            self.next() % end
        }
    }

    /// Does something to `tick` at some time after `now`; what could be seen of it.
    fn live(
        tick: &mut Tick,
        now: &mut Nanos,
        random: &mut Random,
    ) -> (Option<Nanos>, bool, Option<(Nanos, bool)>) {
        now.0 += match random.below(8) {
            0 => random.below(3_000_000_000),
            1..5 => random.below(2_000_000),
            _ => random.below(20_000),
        };
        let mut answer = false;
        match random.below(24) {
            0 => tick.start_periodic(Grid {
                hz: [1_000_000_000, 1_193_182, 32_768][random.below(3) as usize],
                first: random.below(1 << 24),
                every: 1 + random.below(40_000),
            }),
            1 => tick.start_late(Grid::of_nanos(Nanos(now.0 + 100), Nanos(1 + random.below(10_000_000)))),
            2 => tick.start_once(Nanos(now.0 + random.below(50_000_000))),
            3 if random.below(4) == 0 => tick.stop(),
            4 => tick.coalesced(),
            5 => answer = tick.skip(*now),
            6 | 7 if answer || tick.is_raised() => tick.refuse(),
            8 | 9 => tick.unmask(*now),
            10..15 => tick.taken(*now),
            _ => answer = tick.offer(*now, random.below(3) == 0),
        }
        (tick.deadline(), answer, tick.apparent())
    }

    #[test]
    fn a_restored_tick_lives_as_the_saved_one() {
        for policy in TickPolicy::ALL {
            for seed in 0..300 {
                let (mut random, mut now) = (Random(seed), Nanos(1_000_000));
                let config = TickConfig { policy, align: seed % 2 == 0 };
                let mut one = Tick::new(config);
                for _ in 0..random.below(60) {
                    live(&mut one, &mut now, &mut random);
                }
                let state = one.save();
                let text = serde_json::to_string(&state).unwrap();
                let read: TickState = serde_json::from_str(&text).unwrap();
                let mut two = Tick::restore(config, &read, now).unwrap();
                assert_eq!((two, two.save()), (one, state), "{policy} {seed}");
                let (mut other, mut then) = (Random(random.0), now);
                for _ in 0..60 {
                    let seen = live(&mut one, &mut now, &mut random);
                    assert_eq!(live(&mut two, &mut then, &mut other), seen, "{policy} {seed}");
                }
                assert_eq!(one, two);
            }
        }
    }

    #[test]
    fn impossible_states_are_refused_by_name() {
        let now = Nanos(1_000_000_000);
        let periodic = RunState::Periodic { clock_hz: 1_000_000_000, first: 0, every: 1_000_000, next: 9 };
        let state = TickState { run: periodic, ..TickState::default() };
        let refused = |change: &dyn Fn(&mut TickState)| {
            let mut state = state;
            change(&mut state);
            Tick::restore(TickConfig::default(), &state, now).map_err(|e| e.field().to_owned()).unwrap_err()
        };
        assert!(Tick::restore(TickConfig::default(), &state, now).is_ok());
        let clock = |clock_hz| RunState::Periodic { clock_hz, first: 0, every: 1, next: 0 };
        assert_eq!(refused(&|s| s.run = clock(0)), "run.clock_hz");
        assert_eq!(refused(&|s| s.run = clock(u64::MAX)), "run.clock_hz");
        let far = RunState::Periodic { clock_hz: 1, first: 0, every: 1, next: u64::MAX };
        assert_eq!(refused(&|s| s.run = far), "run.next");
        assert_eq!(refused(&|s| s.backlog = 60_001), "backlog");
        assert_eq!(refused(&|s| (s.run, s.backlog) = (RunState::Stopped, 1)), "backlog");
        assert_eq!(refused(&|s| (s.run, s.backlog) = (RunState::Once { at_ns: 0 }, 2)), "backlog");
        assert_eq!(refused(&|s| s.raised_at_ns = Some(5)), "raised_at_ns");
        assert_eq!(refused(&|s| (s.backlog, s.raised_at_ns) = (1, Some(now.0 + 1))), "raised_at_ns");
        assert_eq!(refused(&|s| (s.backlog, s.masked, s.raised_at_ns) = (1, true, Some(1))), "raised_at_ns");
        assert_eq!(refused(&|s| s.taken_at_ns = Some(now.0 + 1)), "taken_at_ns");
        assert_eq!(refused(&|s| s.not_before_ns = now.0 + 125_001), "not_before_ns");
        assert_eq!(refused(&|s| s.rest_until_ns = now.0 + 20_001), "rest_until_ns");
        assert_eq!(refused(&|s| s.counts.missed = MAX_COUNT + 1), "counts.missed");
    }

    #[test]
    fn the_largest_values_that_are_taken_do_not_overflow() {
        let now = Nanos(1 << 62);
        for policy in TickPolicy::ALL {
            for (first, every) in [(0, 1), (u64::MAX, u64::MAX), (u64::MAX, 1), (0, u64::MAX), (5, 0)] {
                for backlog in [0, 1] {
                    let run = RunState::Periodic { clock_hz: 1_000_000_000, first, every, next: MAX_COUNT };
                    let mut state = TickState { run, backlog, ..TickState::default() };
                    state.counts.missed = MAX_COUNT;
                    state.counts.masked = MAX_COUNT;
                    let mut tick = Tick::restore(TickConfig { policy, align: true }, &state, now).unwrap();
                    let mut random = Random(every);
                    let mut now = now;
                    for _ in 0..200 {
                        live(&mut tick, &mut now, &mut random);
                    }
                }
            }
        }
    }
}
