//! [`TimeBase`]: host clock to guest time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::paravirt::{PvClock, TscScale};
use crate::{Nanos, host};

/// What guest time does about the host time that passed while the machine was paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumePolicy {
    /// Guest time goes on where it stopped.
    Freeze,
    /// Guest time jumps by the host time that passed.
    Advance,
    /// Guest time jumps by this span.
    Step(Nanos),
}

#[derive(Debug)]
enum Source {
    /// The host TSC, at its own rate.
    Tsc,
    /// Set by hand: for tests and, later, for deterministic time.
    Manual(AtomicU64),
}

/// The only owner of a machine's time.
///
/// Guest TSC = host TSC + offset (mod 2^64), at the host's rate; guest nanoseconds are a fixed linear
/// function of the guest TSC (the one that the kvmclock page publishes), so the two never disagree.
/// Built paused, at time 0.
#[derive(Debug)]
pub struct TimeBase {
    source: Source,
    hz: u64,
    scale: TscScale,
    /// Guest TSC - host TSC while running.
    offset: AtomicU64,
    running: AtomicBool,
    /// Guest TSC and host wall clock at the last pause.
    paused: Mutex<(u64, Nanos)>,
    /// Wall clock (ns since the epoch) at guest time 0.
    wall_at_zero: AtomicU64,
}

impl TimeBase {
    /// A base that follows the host's clock. Built paused.
    #[must_use]
    pub fn host() -> Arc<TimeBase> {
        Self::build(Source::Tsc, host::tsc_hz(), host::wall())
    }

    /// A base that moves only by [`TimeBase::advance`], at 1 GHz TSC, from the epoch `wall`.
    #[must_use]
    pub fn manual(wall: Nanos) -> Arc<TimeBase> {
        Self::build(Source::Manual(AtomicU64::new(0)), 1_000_000_000, wall)
    }

    fn build(source: Source, hz: u64, wall: Nanos) -> Arc<TimeBase> {
        Arc::new(TimeBase {
            source,
            hz,
            scale: TscScale::for_hz(hz),
            offset: AtomicU64::new(0),
            running: AtomicBool::new(false),
            paused: Mutex::new((0, wall)),
            wall_at_zero: AtomicU64::new(wall.0),
        })
    }

    fn raw(&self) -> u64 {
        match &self.source {
            Source::Tsc => host::tsc(),
            Source::Manual(ticks) => ticks.load(Ordering::Acquire),
        }
    }

    /// Moves a manual base forward; does nothing to one that follows the host.
    pub fn advance(&self, by: Nanos) {
        if let Source::Manual(ticks) = &self.source {
            ticks.fetch_add(by.0, Ordering::AcqRel);
        }
    }

    /// Guest time now.
    #[must_use]
    pub fn now(&self) -> Nanos {
        self.at_tsc(self.tsc())
    }

    /// The guest's time-stamp counter now (before a vCPU's own `IA32_TSC_ADJUST`).
    #[must_use]
    pub fn tsc(&self) -> u64 {
        if self.running.load(Ordering::Acquire) {
            self.raw().wrapping_add(self.offset.load(Ordering::Acquire))
        } else {
            self.paused.lock().unwrap_or_else(std::sync::PoisonError::into_inner).0
        }
    }

    /// Rate of the guest TSC in Hz.
    #[must_use]
    pub fn tsc_hz(&self) -> u64 {
        self.hz
    }

    /// What translated code adds to a host RDTSC to get the guest's, valid until the next pause;
    /// `None` when the base does not follow the host TSC.
    #[must_use]
    pub fn tsc_offset(&self) -> Option<u64> {
        matches!(self.source, Source::Tsc).then(|| self.offset.load(Ordering::Acquire))
    }

    /// Guest time at which the guest TSC shows `tsc`.
    #[must_use]
    pub fn at_tsc(&self, tsc: u64) -> Nanos {
        Nanos(self.scale.to_ns(tsc))
    }

    /// The first guest TSC value whose time is not before `at`.
    #[must_use]
    pub fn tsc_at(&self, at: Nanos) -> u64 {
        at.to_ticks(self.hz).saturating_add(1)
    }

    /// Whether guest time runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Stops guest time. Every vCPU must have stopped before.
    pub fn pause(&self) {
        let mut paused = self.paused.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.running.load(Ordering::Acquire) {
            *paused = (self.raw().wrapping_add(self.offset.load(Ordering::Acquire)), host::wall());
            self.running.store(false, Ordering::Release);
        }
    }

    /// Lets guest time run. Call it before the first vCPU runs.
    pub fn resume(&self, policy: ResumePolicy) {
        let paused = self.paused.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.running.load(Ordering::Acquire) {
            return;
        }
        let (stopped_at, stopped_wall) = *paused;
        let step = match policy {
            ResumePolicy::Freeze => Nanos(0),
            ResumePolicy::Advance => host::wall().saturating_sub(stopped_wall),
            ResumePolicy::Step(by) => by,
        };
        let start = stopped_at.wrapping_add(step.to_ticks(self.hz));
        self.offset.store(start.wrapping_sub(self.raw()), Ordering::Release);
        self.running.store(true, Ordering::Release);
    }

    /// Guest wall clock, in nanoseconds since the Unix epoch: the host's when the machine was built,
    /// plus guest time.
    #[must_use]
    pub fn wall(&self) -> Nanos {
        self.wall_at_zero().saturating_add(self.now())
    }

    /// Wall clock at guest time 0.
    #[must_use]
    pub fn wall_at_zero(&self) -> Nanos {
        Nanos(self.wall_at_zero.load(Ordering::Acquire))
    }

    /// The kvmclock record that describes this base (the same for every vCPU).
    #[must_use]
    pub fn pvclock(&self) -> PvClock {
        PvClock {
            tsc_timestamp: 0,
            system_time: Nanos(0),
            scale: self.scale,
            stable: true,
            guest_stopped: false,
        }
    }
}
