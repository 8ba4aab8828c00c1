//! How a run of the machine ends: the first request counts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

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

/// Takes the first end and tells who waits for it.
#[derive(Default)]
pub(crate) struct Ending {
    end: Mutex<Option<End>>,
    set: AtomicBool,
    changed: Condvar,
}

impl Ending {
    pub(crate) fn new() -> Arc<Ending> {
        Arc::default()
    }

    /// Asks for the end. Later requests are dropped.
    pub(crate) fn request(&self, end: End) {
        let mut slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(end);
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
        let mut slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        while slot.is_none() {
            slot = self.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The end, if it was asked for; the next one may be asked for from now on.
    pub(crate) fn take(&self) -> Option<End> {
        let mut slot = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        self.set.store(false, Ordering::Release);
        slot.take()
    }
}

impl PowerSink for Ending {
    fn request(&self, request: PowerRequest) {
        Ending::request(self, End::Power(request));
    }
}
