//! [`TimeBase`]: host clock to guest time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::paravirt::{PvClock, TscScale};
use crate::pulse::Pulse;
use crate::{Moment, Nanos, host};

mod persist;

pub use persist::TimeState;

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
    /// Set by hand: for tests.
    Manual(AtomicU64),
    /// Moved by the one vCPU, by 1 ns for each instruction that it retires, and by the machine while that is halted.
    Counted(AtomicU64),
}

/// How the guest's time-stamp counter relates to the host's (Xen's `tsc_mode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TscMode {
    /// Starts at 0, runs at the host's rate while the machine runs. Across a restore it goes on from where
    /// it was; where the host's rate is another, the guest is told by its paravirtual clock.
    #[default]
    Default,
    /// Likewise, but every reading is made by the machine and is higher than the one before, on whichever
    /// vCPU. Across a restore the rate stays what it was.
    Emulate,
    /// The host's counter itself, pauses and restores included: no promise of rate or monotony across them.
    Native,
}

/// How a [`TimeBase`] is built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeConfig {
    /// The guest's time-stamp counter.
    pub tsc: TscMode,
    /// Some timer may make guest clocks lag ([`TickPolicy::Delay`](crate::TickPolicy)): readings are noted.
    pub may_lag: bool,
}

/// The only owner of a machine's time.
///
/// The *time line* runs while the machine runs, at the rate of the host TSC. Guest clocks are functions of
/// it: they show it less a lag that is zero but for timers that delay time ([`TimeBase::show`]), and guest
/// nanoseconds are a fixed linear function of the guest TSC (the one that the kvmclock page publishes), so
/// the two never disagree. Deadlines ([`TimerQueue`](crate::TimerQueue)) are points of the time line.
/// Built paused, at time 0.
#[derive(Debug)]
pub struct TimeBase {
    source: Source,
    hz: u64,
    scale: TscScale,
    /// Time line in TSC ticks - host TSC while running.
    offset: AtomicU64,
    /// How far guest clocks stay behind the time line, in TSC ticks ([`TimeBase::show`]).
    lag: AtomicU64,
    /// The latest guest TSC that anybody read, if that is noted.
    latest: Option<AtomicU64>,
    mode: TscMode,
    running: AtomicBool,
    /// Time line in TSC ticks and host wall clock at the last pause. Its lock is held to change `lag`.
    paused: Mutex<(u64, Nanos)>,
    /// Wall clock (ns since the epoch) at guest time 0.
    wall_at_zero: AtomicU64,
    pulse: Pulse,
}

impl TimeBase {
    /// A base that follows the host's clock. Built paused.
    #[must_use]
    pub fn host() -> Arc<TimeBase> {
        Self::host_with(TimeConfig::default())
    }

    /// Likewise, as `config` says.
    #[must_use]
    pub fn host_with(config: TimeConfig) -> Arc<TimeBase> {
        Self::build(Source::Tsc, host::tsc_hz(), host::wall(), config)
    }

    /// A base that moves only by [`TimeBase::advance`], at 1 GHz TSC, from the epoch `wall`.
    #[must_use]
    pub fn manual(wall: Nanos) -> Arc<TimeBase> {
        Self::manual_with(wall, TimeConfig::default())
    }

    /// Likewise, as `config` says.
    #[must_use]
    pub fn manual_with(wall: Nanos, config: TimeConfig) -> Arc<TimeBase> {
        Self::build(Source::Manual(AtomicU64::new(0)), 1_000_000_000, wall, config)
    }

    /// A base that is a function of what the guest does ([`TimeBase::is_counted`]), at 1 GHz TSC, from the epoch
    /// `wall`. It does not ask the host's clock.
    #[must_use]
    pub fn counted(wall: Nanos, config: TimeConfig) -> Arc<TimeBase> {
        Self::build(Source::Counted(AtomicU64::new(0)), 1_000_000_000, wall, config)
    }

    fn build(source: Source, hz: u64, wall: Nanos, config: TimeConfig) -> Arc<TimeBase> {
        Arc::new(Self::make(source, hz, wall, config))
    }

    fn make(source: Source, hz: u64, wall: Nanos, config: TimeConfig) -> TimeBase {
        let noted = config.may_lag || config.tsc == TscMode::Emulate;
        TimeBase {
            source,
            hz,
            scale: TscScale::for_hz(hz),
            offset: AtomicU64::new(0),
            lag: AtomicU64::new(0),
            latest: noted.then(AtomicU64::default),
            mode: config.tsc,
            running: AtomicBool::new(false),
            paused: Mutex::new((0, wall)),
            wall_at_zero: AtomicU64::new(wall.0),
            pulse: Pulse::new(),
        }
    }

    fn raw(&self) -> u64 {
        match &self.source {
            Source::Tsc => host::tsc(),
            Source::Manual(ticks) | Source::Counted(ticks) => ticks.load(Ordering::Acquire),
        }
    }

    /// Moves a manual or counted base forward; does nothing to one that follows the host.
    pub fn advance(&self, by: Nanos) {
        if let Source::Manual(ticks) | Source::Counted(ticks) = &self.source {
            ticks.fetch_add(by.0, Ordering::AcqRel);
        }
    }

    /// Guest time now: what guest clocks show.
    #[must_use]
    pub fn now(&self) -> Nanos {
        let line = self.line();
        let shown = line.saturating_sub(self.lag.load(Ordering::Acquire));
        let seen = self.latest.as_ref().map_or(0, |latest| latest.load(Ordering::Acquire));
        Nanos(self.scale.to_ns(shown.max(seen)))
    }

    /// Guest time now, for a guest that reads a clock: no clock goes behind it any more.
    #[must_use]
    pub fn read(&self) -> Nanos {
        Nanos(self.scale.to_ns(self.shown()))
    }

    /// The time line now: what deadlines refer to. Not earlier than [`TimeBase::now`].
    #[must_use]
    pub fn timeline(&self) -> Nanos {
        Nanos(self.scale.to_ns(self.line()))
    }

    /// The time line now, as the calling thread of a vCPU sees it.
    #[must_use]
    pub fn moment(&self) -> Moment {
        Moment { line: self.timeline(), ran: self.follows_host().then(host::thread_time) }
    }

    /// How far guest clocks are behind the time line.
    #[must_use]
    pub fn lag(&self) -> Nanos {
        Nanos(self.scale.to_ns(self.lag.load(Ordering::Acquire)))
    }

    /// The time line in TSC ticks.
    fn line(&self) -> u64 {
        if self.running.load(Ordering::Acquire) {
            self.raw().wrapping_add(self.offset.load(Ordering::Acquire))
        } else {
            self.paused.lock().unwrap_or_else(std::sync::PoisonError::into_inner).0
        }
    }

    /// A reading in TSC ticks since time 0. Where readings are noted, none is earlier than another.
    fn shown(&self) -> u64 {
        let shown = self.line().saturating_sub(self.lag.load(Ordering::Acquire));
        match &self.latest {
            Some(latest) => latest.fetch_max(shown, Ordering::AcqRel).max(shown),
            None => shown,
        }
    }

    /// Lets guest clocks show `at`, a point of the time line that is not in its future: they lag behind it
    /// from now on. They go forward to it, or back if `back`, though never behind what was read. Does
    /// nothing unless the base was built to lag.
    pub fn show(&self, at: Nanos, back: bool) {
        let Some(latest) = &self.latest else { return };
        let _changing = self.paused.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !self.running.load(Ordering::Acquire) {
            return;
        }
        let line = self.raw().wrapping_add(self.offset.load(Ordering::Acquire));
        let old = self.lag.load(Ordering::Acquire);
        let wanted = line.saturating_sub(at.to_ticks(self.hz));
        let lag = if wanted <= old {
            wanted
        } else if back {
            wanted.min(line.saturating_sub(latest.load(Ordering::Acquire))).max(old)
        } else {
            old
        };
        self.lag.store(lag, Ordering::Release);
    }

    /// The guest's time-stamp counter now (before a vCPU's own `IA32_TSC_ADJUST`).
    #[must_use]
    pub fn tsc(&self) -> u64 {
        match (self.mode, &self.latest) {
            (TscMode::Native, _) => self.raw(),
            (TscMode::Emulate, Some(latest)) => {
                let now = self.line().saturating_sub(self.lag.load(Ordering::Acquire));
                let next = |last: u64| Some(now.max(last.saturating_add(1)));
                let last = latest.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
                last.map_or(now, |last| now.max(last.saturating_add(1)))
            }
            _ => self.shown(),
        }
    }

    /// [`TimeBase::tsc`] and, to be told to the guest before it sees that, [`Pulse::stops`].
    #[must_use]
    pub fn tsc_and_stops(&self) -> (u64, u64) {
        if !matches!((&self.source, &self.latest, self.mode), (Source::Tsc, None, TscMode::Default))
            || !self.running.load(Ordering::Acquire)
        {
            return (self.tsc(), self.pulse.stops());
        }
        let raw = host::tsc();
        let line = raw.wrapping_add(self.offset.load(Ordering::Acquire));
        (line.saturating_sub(self.lag.load(Ordering::Acquire)), self.pulse.stops_at(raw))
    }

    /// How that relates to the host's.
    #[must_use]
    pub fn tsc_mode(&self) -> TscMode {
        self.mode
    }

    /// Rate of the guest TSC in Hz.
    #[must_use]
    pub fn tsc_hz(&self) -> u64 {
        self.hz
    }

    /// What translated code adds to a host RDTSC to get the guest's, valid until the next pause;
    /// `None` when readings must be made by [`TimeBase::tsc`].
    #[must_use]
    pub fn tsc_offset(&self) -> Option<u64> {
        match (&self.source, &self.latest, self.mode) {
            (Source::Tsc, None, TscMode::Native) => Some(0),
            (Source::Tsc, None, _) => Some(self.offset.load(Ordering::Acquire)),
            _ => None,
        }
    }

    /// Whether guest time follows the host's clock, rather than what the guest does.
    #[must_use]
    pub fn follows_host(&self) -> bool {
        matches!(self.source, Source::Tsc)
    }

    /// Whether a retired instruction is a nanosecond of guest time: the engine moves the base before anybody can look.
    #[must_use]
    pub fn is_counted(&self) -> bool {
        matches!(self.source, Source::Counted(_))
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

    /// Whether the whole process was stopped while guest time ran.
    #[must_use]
    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// The kvmclock record that describes this base (the same for every vCPU).
    #[must_use]
    pub fn pvclock(&self) -> PvClock {
        let tsc_timestamp = match self.mode {
            // The counter showed this at guest time 0, had it run as the machine did.
            TscMode::Native => self.offset.load(Ordering::Acquire).wrapping_neg(),
            _ => 0,
        };
        PvClock {
            tsc_timestamp,
            system_time: Nanos(0),
            scale: self.scale,
            stable: true,
            guest_stopped: false,
        }
    }
}
