//! [`Tick`]: the one place where a due tick becomes an interrupt.

use crate::Nanos;

/// A periodic or one-shot tick on an absolute grid: the pure state machine behind PIT channel 0, the
/// RTC's periodic interrupt, HPET timers and the LAPIC timer.
///
/// Missed ticks follow the `late-one` policy (one late tick, then back on the grid); the other policies
/// of `time.md` will be states of this same machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tick {
    /// Grid period; zero means one-shot.
    period: Nanos,
    /// Next point of the grid.
    next: Option<Nanos>,
    /// Ticks delivered and ticks swallowed since the tick was built.
    delivered: u64,
    missed: u64,
}

impl Tick {
    /// A stopped tick.
    #[must_use]
    pub fn stopped() -> Tick {
        Tick::default()
    }

    /// Starts a periodic tick: first at `first`, then every `period` (at least 1 ns).
    pub fn start_periodic(&mut self, first: Nanos, period: Nanos) {
        self.period = Nanos(period.0.max(1));
        self.next = Some(first);
    }

    /// Starts a tick that is due once.
    pub fn start_once(&mut self, at: Nanos) {
        self.period = Nanos(0);
        self.next = Some(at);
    }

    /// Stops the tick.
    pub fn stop(&mut self) {
        self.next = None;
    }

    /// When the tick is due next.
    #[must_use]
    pub fn deadline(&self) -> Option<Nanos> {
        self.next
    }

    /// Whether an interrupt is to be raised at `now`; moves the deadline on along the grid.
    #[must_use]
    pub fn take_due(&mut self, now: Nanos) -> bool {
        let Some(next) = self.next.filter(|next| *next <= now) else {
            return false;
        };
        self.delivered += 1;
        self.next = (now.0 - next.0).checked_div(self.period.0).map(|behind| {
            self.missed += behind;
            next.saturating_add(Nanos((behind + 1).saturating_mul(self.period.0)))
        });
        true
    }

    /// (delivered, missed) ticks so far.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.delivered, self.missed)
    }
}
