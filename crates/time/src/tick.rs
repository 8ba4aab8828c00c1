//! [`Tick`]: the one place where a due tick becomes an interrupt.

mod persist;

use crate::Nanos;
use crate::policy::{SLEW, TickConfig, TickPolicy};

pub use persist::{RunState, TickCountsState, TickState, not_before_saved};

/// A backlog that stands for more time than this is given up at once: the guest is stepped.
pub const MAX_BACKLOG: Nanos = Nanos(60 * Nanos::SECOND.0);
/// A tick that comes this late to a vCPU that did not sleep came while the host did not run the vCPU.
pub const PREEMPTED: Nanos = Nanos(500_000);
/// Sync: a tick that comes this late is skipped. It stands between two points, where a guest that reads its
/// clocks in the handler may find the next point over and count it, and then gets its interrupt as well.
pub const OFF_BEAT: Nanos = Nanos(50_000);
/// Sync: a vCPU that ran for less than this since it took the last tick (at most a quarter of a period) may
/// still be in the handler, and read its clocks there. Another tick is skipped until then, however punctual it
/// is, or the guest counts it twice: lost by what it reads, and by its interrupt.
const HANDLER: Nanos = Nanos(200_000);
/// Sync: without any tick for so long, the next one counts however late it comes.
pub const INSIST: Nanos = Nanos(100_000_000);
/// A timer is not served more often than this, whatever its period: what becomes of the ticks in between is
/// the policy's affair. It bounds what a guest can ask of the thread that serves the timers.
pub const SHORTEST_SERVICE: Nanos = Nanos(20_000);
/// An interrupt that was raised and not taken for so long is raised again: the guest may have reset the
/// controller that held it. Where it still waits, the second merges with the first.
const LOST: Nanos = Nanos::SECOND;

/// A point of the time line, as the thread of a vCPU sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// The time line.
    pub line: Nanos,
    /// How long the host ran that thread so far, if that is known.
    pub ran: Option<Nanos>,
}

impl Moment {
    /// For how long the thread ran since `then`.
    fn ran_since(self, then: Moment) -> Nanos {
        match (self.ran, then.ran) {
            (Some(now), Some(before)) => now.saturating_sub(before),
            _ => self.line.saturating_sub(then.line),
        }
    }
}

impl From<Nanos> for Moment {
    fn from(line: Nanos) -> Moment {
        Moment { line, ran: None }
    }
}

/// The points at which a periodic timer ticks: `first`, then every `every` periods of a clock of `hz` that
/// began at time 0. No rounding adds up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Clock of the timer in Hz.
    pub hz: u64,
    /// First tick, in periods of that clock.
    pub first: u64,
    /// Periods of that clock between ticks; zero counts as one.
    pub every: u64,
}

impl Grid {
    /// A grid of ticks every `period` from `first` on.
    #[must_use]
    pub fn of_nanos(first: Nanos, period: Nanos) -> Grid {
        Grid { hz: Nanos::SECOND.0, first: first.0, every: period.0 }
    }

    fn every(&self) -> u64 {
        self.every.max(1)
    }

    fn point(&self, index: u64) -> Nanos {
        Nanos::from_ticks(self.first.saturating_add(index.saturating_mul(self.every())), self.hz)
    }

    /// Index of the first point after `now`.
    fn after(&self, now: Nanos) -> u64 {
        // `from_ticks` rounds up, so the clock shows a point's count exactly from the point on.
        now.to_ticks(self.hz).checked_sub(self.first).map_or(0, |passed| passed / self.every() + 1)
    }

    /// Time between ticks.
    #[must_use]
    pub fn period(&self) -> Nanos {
        Nanos::from_ticks(self.every(), self.hz)
    }

    fn aligned(self) -> Grid {
        Grid { first: self.first.checked_next_multiple_of(self.every()).unwrap_or(u64::MAX), ..self }
    }
}

/// What happened to the ticks of a [`Tick`] since it was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TickCounts {
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
    /// Ticks given up because the backlog was longer than [`MAX_BACKLOG`].
    pub stepped: u64,
    /// Longest time from due to taken.
    pub latest: Nanos,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Run {
    #[default]
    Stopped,
    /// Due once, at this point.
    Once(Nanos),
    /// Next due at point number `next` of the grid.
    Periodic { grid: Grid, next: u64 },
}

/// A periodic or one-shot tick on an absolute grid: the pure state machine behind PIT channel 0, the RTC's
/// periodic interrupt, HPET timers and the local APIC timer.
///
/// A device says when the tick may become an interrupt ([`Tick::offer`]: on the thread of the vCPU that it
/// goes to, which runs now), whether it was refused because it is masked, and when the guest took it. All
/// times are of one clock: [`TimeBase::timeline`](crate::TimeBase::timeline). No tick is offered before its
/// point, and under every policy but [`TickPolicy::Async`] the grid never moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tick {
    config: TickConfig,
    run: Run,
    /// Ticks that came due and are not taken: the one that waits among them.
    backlog: u64,
    /// The interrupt is raised since this time and not taken.
    raised: Option<Nanos>,
    /// The guest masks the interrupt.
    masked: bool,
    /// Sync: ticks were skipped for [`INSIST`], so the next counts even if the vCPU does not run then.
    /// Otherwise a vCPU that always runs between two points would never see one.
    insist: bool,
    /// Sync: when the guest took one last, or skipping began.
    took: Option<Moment>,
    /// The tick that is raised came due while the vCPU did not run.
    preempted: bool,
    /// Replay-slew: no interrupt before this.
    not_before: Nanos,
    /// Not to be served by the timer thread before this.
    rest: Nanos,
    counts: TickCounts,
}

impl Tick {
    /// A stopped tick with the default policy.
    #[must_use]
    pub fn stopped() -> Tick {
        Tick::default()
    }

    /// A stopped tick that is treated as `config` says.
    #[must_use]
    pub fn new(config: TickConfig) -> Tick {
        Tick { config, ..Tick::default() }
    }

    /// How ticks are treated.
    #[must_use]
    pub fn config(&self) -> TickConfig {
        self.config
    }

    /// Starts a periodic tick; what waited before is forgotten.
    pub fn start_periodic(&mut self, grid: Grid) {
        self.stop();
        let grid = if self.config.align { grid.aligned() } else { grid };
        self.run = Run::Periodic { grid, next: 0 };
    }

    /// Starts a periodic tick one of whose points has just passed: that one is due now.
    pub fn start_late(&mut self, grid: Grid) {
        self.start_periodic(grid);
        self.backlog = 1;
    }

    /// Starts a tick that is due once.
    pub fn start_once(&mut self, at: Nanos) {
        self.stop();
        self.run = Run::Once(at);
    }

    /// Stops the tick; what waits is forgotten.
    pub fn stop(&mut self) {
        *self = Tick { counts: self.counts, rest: self.rest, ..Tick::new(self.config) };
    }

    /// The next point that is not due yet, as far as the tick has looked.
    #[must_use]
    pub fn next(&self) -> Option<Nanos> {
        match self.run {
            Run::Stopped => None,
            Run::Once(at) => (self.backlog == 0).then_some(at),
            Run::Periodic { grid, next } => Some(grid.point(next)),
        }
    }

    /// Whether it is started and has not come to its end.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.run != Run::Stopped
    }

    /// Whether an interrupt was raised that the guest has not taken.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.raised.is_some()
    }

    /// When there is something to [`Tick::offer`].
    fn due(&self) -> Option<Nanos> {
        if self.masked {
            return None;
        }
        if let Some(raised) = self.raised {
            return Some(raised.saturating_add(LOST));
        }
        if self.backlog > 0 { Some(self.not_before) } else { self.next() }
    }

    /// When to let the timer thread see to it; `None` while there is nothing to wait for but the guest.
    #[must_use]
    pub fn deadline(&self) -> Option<Nanos> {
        let rest = if matches!(self.run, Run::Periodic { .. }) { self.rest } else { Nanos(0) };
        self.due().map(|at| at.max(rest))
    }

    /// Whether there is something to [`Tick::offer`].
    #[must_use]
    pub fn is_due(&self, now: Nanos) -> bool {
        self.due().is_some_and(|at| at <= now)
    }

    /// Whether an interrupt is to be raised at `now`, when the vCPU that takes it can do so. `slept`: it
    /// was halted when the tick came due, so that the tick itself woke it.
    #[must_use]
    pub fn offer(&mut self, now: impl Into<Moment>, slept: bool) -> bool {
        let moment = now.into();
        let now = moment.line;
        if self.masked {
            return false;
        }
        if let Some(raised) = self.raised {
            if now < raised.saturating_add(LOST) {
                return false;
            }
            self.raised = Some(now);
            return true;
        }
        if self.backlog == 0 && !self.come_due(moment, slept) || now < self.not_before {
            return false;
        }
        self.raised = Some(now);
        self.rest = now.saturating_add(SHORTEST_SERVICE);
        true
    }

    /// Takes the point that is due into the backlog; says whether anything waits then.
    fn come_due(&mut self, moment: Moment, slept: bool) -> bool {
        let now = moment.line;
        match self.next() {
            Some(at) if at <= now => {
                let late = now.saturating_sub(at);
                self.preempted = !slept && late > PREEMPTED;
                let missed = match self.config.policy {
                    TickPolicy::Sync => {
                        !slept && late > OFF_BEAT || self.may_handle_the_last(at, moment, slept)
                    }
                    _ => !slept && late > PREEMPTED,
                };
                match &mut self.run {
                    Run::Periodic { .. } if missed && !self.insist => self.miss(now),
                    Run::Periodic { next, .. } => {
                        *next += 1;
                        self.backlog = 1;
                        self.insist = false;
                    }
                    _ => self.backlog = 1,
                }
                self.backlog > 0
            }
            _ => false,
        }
    }

    /// Whether the vCPU, for all that is known, had not come to the end of handling the last tick at `point`. One
    /// that sleeps now may have come to it after that.
    fn may_handle_the_last(&self, point: Nanos, now: Moment, slept: bool) -> bool {
        let Run::Periodic { grid, .. } = self.run else { return false };
        let handler = HANDLER.0.min(grid.period().0 / 4);
        self.took.is_some_and(|then| {
            point.saturating_sub(then.line).0 < handler || !slept && now.ran_since(then).0 < handler
        })
    }

    /// Accounts for all points up to `now`. A guest can cause one message in [`MAX_BACKLOG`] at most.
    fn miss(&mut self, now: Nanos) {
        let Run::Periodic { grid, next } = &mut self.run else { return };
        let after = grid.after(now);
        let Some(missed) = after.checked_sub(*next).filter(|missed| *missed > 0) else { return };
        *next = after;
        match self.config.policy {
            TickPolicy::Sync => {
                self.counts.missed += missed;
                let took = self.took.get_or_insert(now.into()).line;
                self.insist = self.backlog == 0 && now.saturating_sub(took) >= INSIST;
            }
            TickPolicy::Async => {
                self.counts.missed += missed.saturating_sub(u64::from(self.backlog == 0));
                self.backlog = 1;
                *grid = Grid { first: now.to_ticks(grid.hz).saturating_add(grid.every()), ..*grid };
                *next = 0;
            }
            _ => self.backlog += missed,
        }
        let most = (MAX_BACKLOG.0 / grid.period().0.max(1)).max(1);
        if self.backlog > most {
            let given_up = self.backlog - 1;
            self.counts.stepped += given_up;
            self.backlog = 1;
            tracing::warn!(
                ticks = given_up,
                "A guest has not taken its timer's interrupts for more than {} s: they are given up",
                MAX_BACKLOG.0 / Nanos::SECOND.0
            );
        }
    }

    /// The interrupt was raised and merged with one that waited.
    pub fn coalesced(&mut self) {
        self.counts.coalesced += 1;
    }

    /// The interrupt was not raised: the guest masks it. A policy that conserves ticks keeps them until
    /// [`Tick::unmask`]; otherwise they are lost, as by the hardware.
    pub fn refuse(&mut self) {
        self.raised = None;
        self.masked = true;
        if let Run::Once(_) = self.run {
            self.counts.masked += 1;
            self.stop();
        }
    }

    /// The guest may take the interrupt now: offer it again.
    pub fn unmask(&mut self, now: Nanos) {
        if !std::mem::take(&mut self.masked) || self.config.policy.conserves() {
            return;
        }
        self.counts.masked += std::mem::take(&mut self.backlog);
        if let Run::Periodic { grid, next } = &mut self.run {
            let after = grid.after(now).max(*next);
            self.counts.masked += after - *next;
            *next = after;
        }
    }

    /// The guest took the interrupt. Another may be due at once: offer it.
    pub fn taken(&mut self, now: impl Into<Moment>) {
        let moment = now.into();
        let now = moment.line;
        if self.raised.take().is_none() {
            return;
        }
        self.counts.delivered += 1;
        self.took = Some(moment);
        self.preempted = false;
        match self.run {
            Run::Stopped => {}
            Run::Once(at) => {
                self.counts.latest = self.counts.latest.max(now.saturating_sub(at));
                self.stop();
            }
            Run::Periodic { grid, next } => {
                let point = grid.point(next.saturating_sub(self.backlog.max(1)));
                self.counts.latest = self.counts.latest.max(now.saturating_sub(point));
                self.not_before = Nanos(0);
                let owed = std::mem::replace(&mut self.backlog, 1).saturating_sub(1);
                if self.config.policy.conserves() {
                    self.counts.replayed += u64::from(owed > 0);
                    self.backlog = owed;
                    if owed == 0 {
                        self.miss(now);
                    }
                    if self.config.policy == TickPolicy::ReplaySlew && self.backlog > 0 {
                        self.not_before = now.saturating_add(Nanos(grid.period().0 / SLEW));
                    }
                } else {
                    self.counts.missed += owed;
                    // What came due meanwhile collapses into the interrupt that was just taken.
                    let before = self.backlog;
                    self.miss(now);
                    if self.config.policy == TickPolicy::LateOne {
                        self.counts.missed += self.backlog - before;
                    }
                    self.backlog = 0;
                }
            }
        }
    }

    /// Nobody wants interrupts: points up to `now` pass by. Says whether there was one.
    pub fn skip(&mut self, now: Nanos) -> bool {
        let passed = self.next().is_some_and(|at| at <= now);
        match &mut self.run {
            Run::Periodic { grid, next } => *next = grid.after(now).max(*next),
            Run::Once(_) if passed => self.stop(),
            _ => {}
        }
        passed
    }

    /// Under [`TickPolicy::Delay`], the time that guest clocks are to show when the guest takes the
    /// interrupt that is raised now: that of the point it stands for. True if they may go back to it,
    /// because the vCPU has not run since; otherwise they may only be put forward.
    #[must_use]
    pub fn apparent(&self) -> Option<(Nanos, bool)> {
        match self.run {
            Run::Periodic { grid, next }
                if self.config.policy == TickPolicy::Delay && self.raised.is_some() =>
            {
                Some((grid.point(next.saturating_sub(self.backlog.max(1))), self.preempted))
            }
            _ => None,
        }
    }

    /// Ticks that came due and were not taken.
    #[must_use]
    pub fn backlog(&self) -> u64 {
        self.backlog
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> TickCounts {
        self.counts
    }
}

#[cfg(test)]
mod tests;
