//! How a run of the machine ends: the first request counts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use wardian_chipset::power::{PowerRequest, PowerSink};
use wardian_cpu::EngineError;

/// Why the vCPUs stopped for good.
#[derive(Debug)]
pub(crate) enum End {
    /// The guest asked.
    Power(PowerRequest),
    /// A vCPU met a fault while delivering a double fault, at this linear address.
    TripleFault {
        /// Number of the vCPU.
        vcpu: usize,
        /// Its RIP.
        rip: u64,
    },
    /// The engine cannot go on.
    Engine(EngineError),
    /// A thread of ours panicked: its name and the message.
    Panic(String, String),
    /// Signal, escape or debugger.
    Outside,
}

#[derive(Default)]
struct Inner {
    end: Option<End>,
    /// Asked for from outside: also ends the life after a reset.
    outside: bool,
}

/// Takes the first end and tells who waits for it. An end from outside is never lost to a reset.
#[derive(Default)]
pub(crate) struct Ending {
    inner: Mutex<Inner>,
    set: AtomicBool,
    changed: Condvar,
}

impl Ending {
    pub(crate) fn new() -> Arc<Ending> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the end. The first request counts.
    pub(crate) fn request(&self, end: End) {
        let mut inner = self.lock();
        inner.outside |= matches!(end, End::Outside);
        if inner.end.is_none() {
            inner.end = Some(end);
            self.set.store(true, Ordering::Release);
            self.changed.notify_all();
        }
    }

    /// Whether the end was asked for: no vCPU goes on after that.
    pub(crate) fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// Waits for the end.
    pub(crate) fn wait(&self) {
        let mut inner = self.lock();
        while inner.end.is_none() {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The end, if it was asked for; the next one may be asked for from now on.
    pub(crate) fn take(&self) -> Option<End> {
        let mut inner = self.lock();
        self.set.store(false, Ordering::Release);
        let outside = std::mem::take(&mut inner.outside);
        match inner.end.take() {
            None | Some(End::Power(PowerRequest::Reset)) if outside => Some(End::Outside),
            end => end,
        }
    }
}

impl PowerSink for Ending {
    fn request(&self, request: PowerRequest) {
        Ending::request(self, End::Power(request));
    }
}
