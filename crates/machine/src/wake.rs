//! How a vCPU sleeps in HLT and is woken.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use wardian_irq::Kick;
use wardian_time::Nanos;

/// The kick that the interrupt chip holds: wakes the vCPU's thread if it sleeps, and makes the engine look
/// up if it runs.
///
/// No wake-up is lost: a kick raises `kicked` and then looks whether somebody sleeps; a sleeper says so and
/// then looks at `kicked` (both in one total order), and it waits under the lock that the kick takes to
/// notify. `kicked` is lowered before the engine looks at the pending interrupts, never after.
pub(crate) struct Wake {
    engine: Arc<dyn Kick>,
    kicked: AtomicBool,
    sleeping: AtomicBool,
    /// Since when on the time line, in ns.
    since: AtomicU64,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Wake {
    /// A wake that passes kicks on to `engine`.
    pub(crate) fn new(engine: Arc<dyn Kick>) -> Arc<Wake> {
        Arc::new(Wake {
            engine,
            kicked: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            since: AtomicU64::new(0),
            lock: Mutex::new(()),
            changed: Condvar::new(),
        })
    }

    /// Forgets kicks so far; call it right before the engine looks at what is pending.
    pub(crate) fn clear(&self) {
        self.kicked.swap(false, Ordering::SeqCst);
    }

    /// Only the engine: it must come back soon.
    pub(crate) fn kick_engine(&self) {
        self.engine.kick();
    }

    /// From `now` on the time line, sleeps until kicked, or not at all if kicked since [`Wake::clear`] or if `not_now`.
    pub(crate) fn sleep(&self, now: Nanos, not_now: impl Fn() -> bool) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.since.store(now.0, Ordering::Relaxed);
        self.sleeping.store(true, Ordering::SeqCst);
        while !self.kicked.swap(false, Ordering::SeqCst) && !not_now() {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Whether the vCPU's thread sleeps.
    pub(crate) fn sleeps(&self) -> bool {
        self.sleeping.load(Ordering::Relaxed)
    }
}

impl Kick for Wake {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.engine.kick();
        if self.sleeping.load(Ordering::SeqCst) {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.changed.notify_all();
        }
    }

    fn slept_at(&self, point: Nanos) -> bool {
        self.sleeping.load(Ordering::Acquire) && self.since.load(Ordering::Relaxed) <= point.0
    }
}
