//! Whether the whole process was stopped: by SIGSTOP, by a suspended host, by a host that hardly runs it.
//!
//! One thread of the machine beats once a second. Whoever finds that the last beat is long past while the
//! process used no processor knows that nothing of it ran: to the guest, time has jumped.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Nanos, host};

/// The longest silence between two beats that are a second apart in a process that runs.
const SILENCE: Nanos = Nanos(1_500_000_000);

/// The shared side: the time of the last beat and the number of stops.
#[derive(Debug)]
pub struct Pulse {
    /// Host ticks of the last beat; 0 while nobody beats.
    last: AtomicU64,
    /// CPU time of the process then.
    used: AtomicU64,
    stops: AtomicU64,
    silence: u64,
}

impl Pulse {
    pub(crate) fn new() -> Pulse {
        Pulse {
            last: AtomicU64::new(0),
            used: AtomicU64::new(0),
            stops: AtomicU64::new(0),
            silence: SILENCE.to_ticks(host::tsc_hz()),
        }
    }

    /// How often the process was stopped so far, a stop that has just ended counted in (perhaps twice, by
    /// several threads at once): a number that differs from the one before means a stop in between.
    #[must_use]
    pub fn stops(&self) -> u64 {
        let last = self.last.load(Ordering::Relaxed);
        if last != 0 && host::tsc().wrapping_sub(last) as i64 > self.silence as i64 {
            self.silent(last);
        }
        self.stops.load(Ordering::Acquire)
    }

    #[cold]
    fn silent(&self, last: u64) {
        let (now, used) = (host::tsc(), host::cpu_time());
        let since = host::ticks_to_nanos(now.wrapping_sub(last));
        if was_stopped(since, used.saturating_sub(Nanos(self.used.load(Ordering::Relaxed)))) {
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

/// Whether a process that used the processors for `used` of the last `since` was stopped, rather than that
/// the thread which beats came late.
fn was_stopped(since: Nanos, used: Nanos) -> bool {
    since >= SILENCE && used.0 < since.0 / 10
}

/// What happened between two beats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beat {
    /// Host time since the last beat, without time in which the host was suspended.
    pub since: Nanos,
    /// Time in which the host was suspended.
    pub suspended: Nanos,
    /// The process was stopped in between.
    pub stopped: bool,
}

/// The side of the thread that beats.
#[derive(Debug)]
pub struct Heart {
    ticks: u64,
    used: Nanos,
    /// Boot clock less monotonic clock: how long the host was ever suspended.
    asleep: Nanos,
}

impl Heart {
    /// Begins to beat.
    #[must_use]
    pub fn start(pulse: &Pulse) -> Heart {
        let heart = Heart { ticks: host::tsc(), used: host::cpu_time(), asleep: host::time_suspended() };
        pulse.beat(heart.ticks, heart.used);
        heart
    }

    /// Beats: call it once a second.
    pub fn beat(&mut self, pulse: &Pulse) -> Beat {
        let now = Heart { ticks: host::tsc(), used: host::cpu_time(), asleep: host::time_suspended() };
        let since = host::ticks_to_nanos(now.ticks.wrapping_sub(self.ticks));
        let suspended = now.asleep.saturating_sub(self.asleep);
        // The two clocks are read one after the other.
        let suspended = if suspended < Nanos(500_000_000) { Nanos(0) } else { suspended };
        let stopped = suspended.0 != 0 || was_stopped(since, now.used.saturating_sub(self.used));
        if stopped {
            pulse.count();
        }
        pulse.beat(now.ticks, now.used);
        *self = now;
        Beat { since, suspended, stopped }
    }
}

#[cfg(test)]
mod tests {
    use super::{Heart, Pulse, SILENCE, was_stopped};
    use crate::{Nanos, host};

    #[test]
    fn a_late_beat_is_no_stop_and_a_silent_process_is() {
        let long = Nanos(30_000_000_000);
        for (since, used, stopped) in [
            (Nanos(1_000_000_000), Nanos(0), false),
            (SILENCE, Nanos(0), true),
            (long, Nanos(100_000), true),
            (long, Nanos(2_900_000_000), true),
            (long, Nanos(3_000_000_000), false),
            (Nanos(2_000_000_000), Nanos(1_900_000_000), false),
        ] {
            assert_eq!(was_stopped(since, used), stopped, "{since:?} {used:?}");
        }
    }

    #[test]
    fn a_stop_is_seen_by_everybody_once_it_is_over() {
        let pulse = Pulse::new();
        assert_eq!(pulse.stops(), 0, "nobody beats");
        let mut heart = Heart::start(&pulse);
        assert_eq!(pulse.stops(), 0);
        // As if nothing of the process had run since the machine was booted.
        let long_ago = host::tsc() - Nanos(5_000_000_000).to_ticks(host::tsc_hz());
        pulse.beat(long_ago, host::cpu_time());
        assert_eq!(pulse.stops(), 1);
        assert_eq!(pulse.stops(), 1, "once");
        (heart.ticks, heart.used) = (long_ago, host::cpu_time());
        let beat = heart.beat(&pulse);
        assert!(beat.stopped && beat.since >= Nanos(5_000_000_000), "{beat:?}");
        assert_eq!(pulse.stops(), 2);
        assert!(!heart.beat(&pulse).stopped);
        pulse.beat(long_ago, Nanos(0));
        pulse.still();
        assert_eq!(pulse.stops(), 2);
    }
}
