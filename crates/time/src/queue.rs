//! The timer queue: absolute deadlines, one serving thread.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::{Nanos, TimeBase};

/// Something that wants to know when its deadline has passed.
pub trait TimerHandler: Send + Sync {
    /// Called on the serving thread, without any lock of the queue held, once per armed deadline. `now` is
    /// guest time.
    fn expired(&self, now: Nanos);
}

#[derive(Default)]
struct Inner {
    armed: BTreeSet<(Nanos, usize)>,
    slots: Vec<Slot>,
}

struct Slot {
    deadline: Option<Nanos>,
    handler: Weak<dyn TimerHandler>,
}

/// All deadlines of one machine, as points of its time line.
///
/// Lock order: the queue's lock is a leaf; handlers are called without it.
pub struct TimerQueue {
    base: Arc<TimeBase>,
    inner: Mutex<Inner>,
    changed: Condvar,
    stop: AtomicBool,
    /// How late the latest handler was called since somebody asked, in nanoseconds.
    late: AtomicU64,
}

impl TimerQueue {
    /// An empty queue on `base`.
    #[must_use]
    pub fn new(base: Arc<TimeBase>) -> Arc<TimerQueue> {
        Arc::new(TimerQueue {
            base,
            inner: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            late: AtomicU64::new(0),
        })
    }

    /// The base that the deadlines refer to.
    #[must_use]
    pub fn base(&self) -> &Arc<TimeBase> {
        &self.base
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A disarmed timer for `handler`. A handler that is gone is skipped.
    #[must_use]
    pub fn timer(self: &Arc<Self>, handler: Weak<dyn TimerHandler>) -> Timer {
        let mut inner = self.lock();
        inner.slots.push(Slot { deadline: None, handler });
        Timer { queue: Arc::clone(self), id: inner.slots.len() - 1 }
    }

    fn arm(&self, id: usize, at: Option<Nanos>) {
        let mut inner = self.lock();
        let old = std::mem::replace(&mut inner.slots[id].deadline, at);
        if old == at {
            return;
        }
        if let Some(old) = old {
            inner.armed.remove(&(old, id));
        }
        if let Some(at) = at {
            inner.armed.insert((at, id));
            let first = inner.armed.first() == Some(&(at, id));
            // Whoever wakes finds the lock free. It is not late: it looks at the deadlines under the lock before it waits.
            drop(inner);
            if first {
                self.changed.notify_all();
            }
        }
    }

    /// The earliest deadline.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Nanos> {
        self.lock().armed.first().map(|first| first.0)
    }

    /// Calls every handler whose deadline is not after the base's time line; says how many.
    pub fn run_due(&self) -> usize {
        let mut count = 0;
        loop {
            let now = self.base.timeline();
            let handler = {
                let mut inner = self.lock();
                match inner.armed.first().copied() {
                    Some((at, id)) if at <= now => {
                        inner.armed.pop_first();
                        self.late.fetch_max(now.0 - at.0, Ordering::Relaxed);
                        inner.slots[id].deadline = None;
                        inner.slots[id].handler.upgrade()
                    }
                    _ => return count,
                }
            };
            if let Some(handler) = handler {
                // Not a reading by the guest.
                handler.expired(now.saturating_sub(self.base.lag()));
                count += 1;
            }
        }
    }

    /// How late the latest handler was called since this was last asked, one that is due now counted in.
    pub fn take_lateness(&self) -> Nanos {
        let waits = match self.next_deadline() {
            Some(at) if self.base.is_running() => self.base.timeline().saturating_sub(at).0,
            _ => 0,
        };
        Nanos(self.late.swap(0, Ordering::Relaxed).max(waits))
    }

    /// Serves the queue on the calling thread until [`TimerQueue::stop`]. While guest time is paused
    /// nothing is due.
    pub fn serve(&self) {
        crate::set_timer_slack();
        while !self.stop.load(Ordering::Acquire) {
            if self.base.is_running() {
                self.run_due();
            }
            let inner = self.lock();
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let wait = match inner.armed.first() {
                Some((at, _)) if self.base.is_running() => {
                    let now = self.base.timeline();
                    if *at <= now {
                        continue;
                    }
                    Some(Duration::from_nanos(at.0 - now.0))
                }
                _ => None,
            };
            match wait {
                Some(wait) => drop(self.changed.wait_timeout(inner, wait)),
                None => drop(self.changed.wait(inner)),
            }
        }
    }

    /// Wakes the serving thread to look again: call it after guest time was resumed.
    pub fn wake(&self) {
        let _inner = self.lock();
        self.changed.notify_all();
    }

    /// Ends [`TimerQueue::serve`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }
}

impl std::fmt::Debug for TimerQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TimerQueue").field("next", &self.next_deadline()).finish_non_exhaustive()
    }
}

/// One deadline in a [`TimerQueue`].
#[derive(Debug)]
pub struct Timer {
    queue: Arc<TimerQueue>,
    id: usize,
}

impl Timer {
    /// Arms the timer for guest time `at`, replacing an older deadline.
    pub fn arm(&self, at: Nanos) {
        self.set(Some(at));
    }

    /// Disarms the timer.
    pub fn disarm(&self) {
        self.queue.arm(self.id, None);
    }

    /// Arms the timer for a guest time, or disarms it.
    pub fn set(&self, at: Option<Nanos>) {
        let lag = self.queue.base.lag();
        self.queue.arm(self.id, at.map(|at| at.saturating_add(lag)));
    }

    /// Arms the timer for a point of the time line, as a [`Tick`](crate::Tick) says it, or disarms it.
    pub fn set_line(&self, at: Option<Nanos>) {
        self.queue.arm(self.id, at);
    }

    /// The base of the queue.
    #[must_use]
    pub fn base(&self) -> &Arc<TimeBase> {
        self.queue.base()
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.disarm();
    }
}
