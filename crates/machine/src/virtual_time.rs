//! Guest time as a function of what the guest does: 1 ns for each instruction that the one vCPU retires.
//!
//! Deadlines are instructions then: the vCPU runs to the next one and not further, its own thread serves the timer
//! queue there, and a halted vCPU is at the next deadline at once. So two runs of a guest that hears nothing from
//! outside (no disk, no input) take the same interrupts at the same instructions.

use std::io::Write;
use std::sync::Arc;

use wardian_cpu::{OnTaken, Vcpu};
use wardian_time::{Nanos, TimeBase, TimerQueue};

/// Wall clock of the guest when it starts: 2000-01-01, 00:00 UTC, whatever the host's is.
pub(crate) const EPOCH: Nanos = Nanos(946_684_800 * Nanos::SECOND.0);

/// Generation ID of such a machine, so that a guest that draws on it does the same every time.
pub(crate) const GENERATION_ID: [u8; 16] = *b"Wardian, virtual";

/// Most interrupts that are written down: a hostile guest does not fill the host's disk.
const MAX_LINES: u64 = 1 << 20;

/// Who keeps the vCPU to the timers.
#[derive(Clone, Copy)]
pub(crate) struct Pace<'a>(&'a TimerQueue);

impl Pace<'_> {
    /// The pace of a machine whose time is counted; `None` for others.
    pub(crate) fn of(queue: &TimerQueue) -> Option<Pace<'_>> {
        queue.base().is_counted().then_some(Pace(queue))
    }

    fn ahead(self) -> Option<u64> {
        let now = self.0.base().timeline();
        self.0.next_deadline().map(|at| at.saturating_sub(now).0)
    }

    /// Serves what is due and lets `vcpu` run as far as the next deadline.
    pub(crate) fn set(self, vcpu: &mut dyn Vcpu) {
        self.0.run_due();
        let retired = vcpu.retired().unwrap_or(0);
        vcpu.set_limit(self.ahead().map(|ns| retired.saturating_add(ns)));
    }

    /// The vCPU is halted: it is the time of the next deadline. False if there is none.
    pub(crate) fn skip(self) -> bool {
        let Some(ns) = self.ahead() else { return false };
        self.0.base().advance(Nanos(ns));
        true
    }
}

/// Writes a line for each interrupt that a vCPU takes. `out` must not block.
pub(crate) fn trace(time: Arc<TimeBase>, mut out: Box<dyn Write + Send>) -> OnTaken {
    let _ = out.write_all(b"retired,guest_ns,rip,vector\n");
    let mut lines = 0;
    Box::new(move |taken| {
        if lines < MAX_LINES {
            lines += 1;
            let (now, rip) = (time.timeline().0, taken.rip);
            let _ = writeln!(out, "{},{now},{rip:#x},{}", taken.retired, taken.vector);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::Pace;
    use std::sync::{Arc, Mutex};
    use wardian_time::{Nanos, ResumePolicy, TimeBase, TimeConfig, TimerHandler, TimerQueue};

    #[derive(Default)]
    struct Heard(Mutex<Vec<u64>>);
    impl TimerHandler for Heard {
        fn expired(&self, now: Nanos) {
            self.0.lock().unwrap().push(now.0);
        }
    }

    #[test]
    fn a_halted_vcpu_is_at_the_deadline_at_once() {
        let base = TimeBase::counted(super::EPOCH, TimeConfig::default());
        assert_eq!(base.wall().0 / Nanos::SECOND.0, 946_684_800);
        let queue = TimerQueue::new(Arc::clone(&base));
        base.resume(ResumePolicy::Freeze);
        let pace = Pace::of(&queue).expect("counted");
        assert!(!pace.skip());
        let heard = Arc::new(Heard::default());
        let timer = queue.timer(Arc::downgrade(&heard) as _);
        timer.arm(Nanos(1_000_007));
        base.advance(Nanos(13));
        assert_eq!(pace.ahead(), Some(999_994));
        assert!(pace.skip());
        queue.run_due();
        assert_eq!(*heard.0.lock().unwrap(), [1_000_007]);
        assert!(Pace::of(&TimerQueue::new(TimeBase::manual(Nanos(0)))).is_none());
    }
}
