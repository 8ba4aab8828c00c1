//! [`TickPolicy`]: what becomes of ticks that the guest could not take in time.

use std::fmt;
use std::str::FromStr;

/// What a [`Tick`](crate::Tick) does about ticks that came due while the vCPU did not run.
///
/// The first five are the timer modes of Xen's virtual platform timers and their names in the discussion
/// of 2007 (`vpt.c`; SYNC and MIXED are `no_missed_ticks_pending` and `one_missed_tick_pending`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TickPolicy {
    /// All missed ticks come, back to back, and guest time stands still until each is delivered: it lags
    /// and catches up tick by tick. For guests that count ticks and read other clocks as well.
    Delay,
    /// All missed ticks come, back to back; guest time runs on. For guests that count ticks.
    Replay,
    /// All missed ticks come, no faster than [`SLEW`] times the rate. For guests that count ticks and are
    /// upset by bursts.
    ReplaySlew,
    /// Missed ticks are lost; the next comes on the grid. For guests that see lost ticks by another clock.
    Sync,
    /// Missed ticks become one late tick, then the grid goes on. The cheapest, for guests that do not count.
    #[default]
    LateOne,
    /// One late tick, and the grid begins anew from there. It drifts: for the lab, to repeat old measurements.
    Async,
}

/// How many times faster than its rate a tick catches up under [`TickPolicy::ReplaySlew`].
pub const SLEW: u64 = 8;

impl TickPolicy {
    /// Every policy, in the order of their description.
    pub const ALL: [TickPolicy; 6] = [
        TickPolicy::Delay,
        TickPolicy::Replay,
        TickPolicy::ReplaySlew,
        TickPolicy::Sync,
        TickPolicy::LateOne,
        TickPolicy::Async,
    ];

    /// Whether no tick is ever lost (but for the bound on the backlog).
    #[must_use]
    pub fn conserves(self) -> bool {
        matches!(self, TickPolicy::Delay | TickPolicy::Replay | TickPolicy::ReplaySlew)
    }

    /// Name as options spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            TickPolicy::Delay => "delay",
            TickPolicy::Replay => "replay",
            TickPolicy::ReplaySlew => "replay-slew",
            TickPolicy::Sync => "sync",
            TickPolicy::LateOne => "late-one",
            TickPolicy::Async => "async",
        }
    }
}

impl fmt::Display for TickPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No such policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("There is no timer policy {0:?}: it is one of delay, replay, replay-slew, sync, late-one, async")]
pub struct UnknownPolicy(String);

impl FromStr for TickPolicy {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<TickPolicy, UnknownPolicy> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.name() == name)
            .ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}

/// How a timer treats its ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TickConfig {
    /// What becomes of missed ticks.
    pub policy: TickPolicy,
    /// Periodic grids begin at a multiple of their period of guest time, so that timers of equal rate tick
    /// together and the host wakes less often.
    pub align: bool,
}
