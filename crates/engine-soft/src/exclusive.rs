//! One vCPU alone: what must be atomic against all others and is more than one access of the host.
//!
//! A read-modify-write that crosses a page is made of two halves, which may lie anywhere in the host's memory. Its
//! vCPU asks the others to leave guest code, waits until they have, runs the one instruction and lets them go on.
//! A vCPU that waits for its turn is itself outside guest code, so nobody waits for ever; one that runs guest
//! code comes to the next block head within microseconds.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The state of the matter in one machine. Its lock is a leaf.
#[derive(Debug, Default)]
pub struct Exclusive {
    /// Some vCPU is alone, or about to be.
    taken: Mutex<bool>,
    /// The same, for a look without the lock.
    stop: AtomicBool,
    changed: Condvar,
}

/// Whether one vCPU is in guest code.
#[derive(Debug, Default)]
pub struct Presence(AtomicBool);

impl Exclusive {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes into guest code, when nobody wants to be alone there.
    pub fn enter(&self, own: &Presence) {
        loop {
            // Each side says what it does and then looks at the other, in one order for all.
            own.0.store(true, Ordering::SeqCst);
            if !self.stop.load(Ordering::SeqCst) {
                return;
            }
            own.0.store(false, Ordering::SeqCst);
            let mut taken = self.lock();
            while *taken {
                taken = self.changed.wait(taken).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Leaves guest code.
    pub fn leave(&self, own: &Presence) {
        own.0.store(false, Ordering::SeqCst);
    }

    /// Waits, outside guest code, until nobody else is alone there, and takes the place. `ask` makes the others
    /// look up, `others` says whether one of them is in guest code.
    pub fn begin(&self, own: &Presence, ask: impl FnOnce(), others: impl Fn() -> bool) {
        self.leave(own);
        let mut taken = self.lock();
        while *taken {
            taken = self.changed.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken = true;
        self.stop.store(true, Ordering::SeqCst);
        drop(taken);
        ask();
        while others() {
            std::thread::yield_now();
        }
        own.0.store(true, Ordering::SeqCst);
    }

    /// Lets the others go on.
    pub fn end(&self) {
        let mut taken = self.lock();
        *taken = false;
        self.stop.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }
}

impl Presence {
    /// Whether the vCPU is in guest code.
    pub fn is_inside(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::{Exclusive, Presence};
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn whoever_is_alone_is_alone() {
        const ROUNDS: u64 = 2000;
        let exclusive = Exclusive::default();
        let places: [Presence; 4] = Default::default();
        let counter = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for own in 0..places.len() {
                let (exclusive, places, counter) = (&exclusive, &places, &counter);
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        exclusive.enter(&places[own]);
                        // A torn increment, as two halves of memory would be.
                        exclusive.begin(
                            &places[own],
                            || (),
                            || places.iter().enumerate().any(|(n, place)| n != own && place.is_inside()),
                        );
                        let old = counter.load(Ordering::Relaxed);
                        std::thread::yield_now();
                        counter.store(old + 1, Ordering::Relaxed);
                        exclusive.end();
                        exclusive.leave(&places[own]);
                    }
                });
            }
        });
        assert_eq!(counter.into_inner(), ROUNDS * places.len() as u64);
    }
}
