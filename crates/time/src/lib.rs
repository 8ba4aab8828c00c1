//! Guest time: the one owner of it, and the queue of what is due.
//!
//! *Comes in*: the host's time-stamp counter and monotonic clock. *Goes out*: guest nanoseconds
//! ([`Nanos`]), the guest TSC, paravirtual clock pages, and calls to [`TimerHandler`]s when their
//! absolute deadline has passed.
//!
//! **Architecture Invariant:** no other room reads the host's clock (but `backend`, once, to set the
//! RTC). **Architecture Invariant:** every clock that a guest can read is a pure function of one
//! [`TimeBase`], so all of them lag or lead together. **Architecture Invariant:** deadlines are
//! absolute and periodic ticks stay on their grid; nothing re-arms at "now + period".
//!
//! **API Boundary:** [`TimeBase`], [`TimerQueue`], [`Timer`], [`Tick`], [`TickPolicy`], [`paravirt`].

mod base;
mod host;
pub mod paravirt;
mod policy;
mod pulse;
mod queue;
#[cfg(test)]
mod tests;
mod tick;

pub use base::{ResumePolicy, TimeBase, TimeConfig, TimeState, TscMode};
pub use host::{
    RunDelay, ThreadTime, host_hz, host_ticks, raw as host_raw, set_timer_slack, state_host_hz,
    ticks_to_nanos, wall as host_wall,
};
pub use policy::{SLEW, TickConfig, TickPolicy, UnknownPolicy};
pub use pulse::{Beat, Heart, Pulse};
pub use queue::{Timer, TimerHandler, TimerQueue};
pub use tick::{
    Grid, MAX_BACKLOG, Moment, PREEMPTED, RunState, SHORTEST_SERVICE, Tick, TickCounts, TickCountsState,
    TickState, not_before_saved,
};

/// A point in guest time, or a span of it, in nanoseconds. Guest time starts at 0 when the machine
/// is built and runs only while the machine runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// One second.
    pub const SECOND: Nanos = Nanos(1_000_000_000);

    /// `self + other`, stopping at the end of time (584 years).
    #[must_use]
    pub fn saturating_add(self, other: Nanos) -> Nanos {
        Nanos(self.0.saturating_add(other.0))
    }

    /// `self - other`, or zero if `other` is later.
    #[must_use]
    pub fn saturating_sub(self, other: Nanos) -> Nanos {
        Nanos(self.0.saturating_sub(other.0))
    }

    /// How many periods of a clock of `hz` have passed at this point since time 0.
    #[must_use]
    pub fn to_ticks(self, hz: u64) -> u64 {
        (u128::from(self.0) * u128::from(hz) / 1_000_000_000) as u64
    }

    /// The earliest point at which a clock of `hz` shows `ticks`.
    #[must_use]
    pub fn from_ticks(ticks: u64, hz: u64) -> Nanos {
        let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(hz.max(1)));
        Nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}
