//! Whether the whole process was stopped: by SIGSTOP, by a suspended host, by a host that hardly runs it.
//!
//! One thread of the machine beats once a second. Whoever finds that the last beat is long past, and that the
//! process used no more CPU time than before that beat was missed, takes it that nothing of it ran: to the guest,
//! time has jumped. The thread that beats knows it for sure: it was late, and not for want of a processor.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Nanos, RunDelay, host};

/// From beat to beat.
const BEAT: Nanos = Nanos(1_000_000_000);
/// How late a beat may be in a process that runs.
const LATE: Nanos = Nanos(500_000_000);

/// The shared side: the time of the last beat and the number of stops.
#[derive(Debug)]
pub struct Pulse {
    /// Host ticks of the last beat; 0 while nobody beats.
    last: AtomicU64,
    /// CPU time of the process then.
    used: AtomicU64,
    stops: AtomicU64,
    /// Ticks without a beat that are too many.
    silence: u64,
    /// CPU time that the process can use from beat to beat.
    usable: Nanos,
}

impl Pulse {
    pub(crate) fn new() -> Pulse {
        Pulse {
            last: AtomicU64::new(0),
            used: AtomicU64::new(0),
            stops: AtomicU64::new(0),
            silence: BEAT.saturating_add(LATE).to_ticks(host::tsc_hz()),
            usable: Nanos(
                std::thread::available_parallelism().map_or(1, |n| n.get() as u64) * BEAT.0 / 10 * 11,
            ),
        }
    }

    /// How often the process was stopped so far, a stop that has just ended counted in (perhaps twice, by
    /// several threads at once): a number that differs from the one before means a stop in between.
    #[must_use]
    pub fn stops(&self) -> u64 {
        self.stops_at(host::tsc())
    }

    /// Likewise, with the host's ticks read by the caller just now.
    #[inline]
    pub(crate) fn stops_at(&self, now: u64) -> u64 {
        let last = self.last.load(Ordering::Relaxed);
        if last != 0 && now.wrapping_sub(last) as i64 > self.silence as i64 {
            self.silent();
        }
        self.stops.load(Ordering::Acquire)
    }

    #[cold]
    fn silent(&self) {
        let (now, used) = (host::tsc(), host::cpu_time());
        if used.saturating_sub(Nanos(self.used.load(Ordering::Relaxed))) <= self.usable {
            // Before the beat, so that who sees the new beat sees the new number.
            self.stops.fetch_add(1, Ordering::AcqRel);
        }
        self.used.store(used.0, Ordering::Relaxed);
        self.last.store(now, Ordering::Release);
    }

    fn beat(&self, now: u64, used: Nanos) {
        self.used.store(used.0, Ordering::Relaxed);
        self.last.store(now, Ordering::Release);
    }

    fn count(&self) {
        self.stops.fetch_add(1, Ordering::AcqRel);
    }

    /// Nobody beats from now on.
    pub fn still(&self) {
        self.last.store(0, Ordering::Release);
    }
}

/// Whether the thread that beats, `since` after its last beat, was stopped, when for `delayed` of that it was only
/// not run.
fn was_stopped(since: Nanos, delayed: Nanos) -> bool {
    since.saturating_sub(BEAT).saturating_sub(delayed) >= LATE
}

/// What happened between two beats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beat {
    /// Time since the last beat by the host's time-stamp counter, which may or may not run while the host is
    /// suspended.
    pub since: Nanos,
    /// Time in which the host was suspended.
    pub suspended: Nanos,
    /// The process was stopped in between.
    pub stopped: bool,
}

impl Beat {
    /// Real time since the last beat.
    #[must_use]
    pub fn elapsed(&self) -> Nanos {
        if self.since > self.suspended { self.since } else { self.since.saturating_add(self.suspended) }
    }
}

/// The side of the thread that beats.
#[derive(Debug)]
pub struct Heart {
    ticks: u64,
    delay: RunDelay,
    delayed: Nanos,
    /// Boot clock less monotonic clock: how long the host was ever suspended.
    asleep: Nanos,
}

impl Heart {
    /// Begins to beat, on this thread.
    #[must_use]
    pub fn start(pulse: &Pulse) -> Heart {
        let delay = RunDelay::of_this_thread();
        let delayed = delay.read();
        let heart = Heart { ticks: host::tsc(), delay, delayed, asleep: host::time_suspended() };
        pulse.beat(heart.ticks, host::cpu_time());
        heart
    }

    /// Beats: call it once a second.
    pub fn beat(&mut self, pulse: &Pulse) -> Beat {
        let (ticks, delayed, asleep) = (host::tsc(), self.delay.read(), host::time_suspended());
        // A counter that starts anew with the host does not run back for long.
        let since = host::ticks_to_nanos(ticks.saturating_sub(self.ticks));
        let suspended = asleep.saturating_sub(self.asleep);
        // The two clocks are read one after the other.
        let suspended = if suspended < Nanos(500_000_000) { Nanos(0) } else { suspended };
        let stopped = suspended.0 != 0 || was_stopped(since, delayed.saturating_sub(self.delayed));
        if stopped {
            pulse.count();
        }
        pulse.beat(ticks, host::cpu_time());
        (self.ticks, self.delayed, self.asleep) = (ticks, delayed, asleep);
        Beat { since, suspended, stopped }
    }
}

#[cfg(test)]
mod tests {
    use super::{BEAT, Beat, Heart, LATE, Pulse, was_stopped};
    use crate::{Nanos, host};

    const S: u64 = 1_000_000_000;

    #[test]
    fn a_late_beat_is_no_stop_and_a_silent_process_is() {
        for (since, delayed, stopped) in [
            (BEAT, 0, false),
            (Nanos(BEAT.0 + LATE.0), 0, true),
            (Nanos(BEAT.0 + LATE.0), 1, false),
            (Nanos(30 * S), 0, true),
            (Nanos(30 * S), 10 * S, true),
            (Nanos(30 * S), 29 * S, false),
        ] {
            assert_eq!(was_stopped(since, Nanos(delayed)), stopped, "{since:?} {delayed}");
        }
    }

    #[test]
    fn suspended_time_is_counted_once() {
        let beat = |since: u64, suspended: u64| Beat {
            since: Nanos(since * S),
            suspended: Nanos(suspended * S),
            stopped: true,
        };
        assert_eq!(beat(61, 60).elapsed(), Nanos(61 * S), "the counter ran on");
        assert_eq!(beat(1, 60).elapsed(), Nanos(61 * S), "it did not");
        assert_eq!(beat(1, 0).elapsed(), Nanos(S));
    }

    #[test]
    fn a_stop_is_seen_by_everybody_once_it_is_over() {
        let mut pulse = Pulse::new();
        assert_eq!(pulse.stops(), 0, "nobody beats");
        let mut heart = Heart::start(&pulse);
        assert_eq!(pulse.stops(), 0);
        // As if nothing of the process had run for 5 s.
        let long_ago = || host::tsc() - Nanos(5 * S).to_ticks(host::tsc_hz());
        pulse.beat(long_ago(), host::cpu_time());
        assert_eq!(pulse.stops(), 1);
        assert_eq!(pulse.stops(), 1, "once");
        // The process computed all the time: it is the beat that is late.
        let usable = std::mem::replace(&mut pulse.usable, Nanos(0));
        pulse.beat(long_ago(), Nanos(0));
        assert_eq!(pulse.stops(), 1);
        pulse.usable = usable;
        heart.ticks = long_ago();
        let beat = heart.beat(&pulse);
        assert!(beat.stopped && beat.since >= Nanos(5 * S), "{beat:?}");
        assert_eq!(pulse.stops(), 2);
        assert!(!heart.beat(&pulse).stopped);
        pulse.beat(long_ago(), host::cpu_time());
        pulse.still();
        assert_eq!(pulse.stops(), 2);
    }
}
