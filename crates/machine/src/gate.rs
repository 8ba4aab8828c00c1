//! Who may run: the one protocol by which vCPUs are paused, held by a debugger, and sent home.
//!
//! A vCPU is asked to rest (by a pause, a hold or the end of the machine), notices at its next exit with
//! no answer outstanding, and acknowledges. Only the vCPU's own thread says that it rests; who lets it go
//! takes that back at once, so that nobody mistakes a vCPU that is about to run for one at rest.
//!
//! Lock order: the gate's lock is a leaf.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Is {
    Running,
    Resting,
    Gone,
}

#[derive(Debug)]
struct Inner {
    is: Vec<Is>,
    held: Vec<bool>,
    pauses: usize,
    leaving: bool,
}

impl Inner {
    fn must_rest(&self, index: usize) -> bool {
        self.pauses > 0 || self.held[index]
    }
}

/// The gate of one machine.
#[derive(Debug)]
pub(crate) struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// For each vCPU: it should look at the gate.
    attention: Vec<AtomicBool>,
}

impl Gate {
    /// A gate for `count` vCPUs, all held or none.
    pub(crate) fn new(count: usize, held: bool) -> Gate {
        Gate {
            inner: Mutex::new(Inner {
                is: vec![Is::Running; count],
                held: vec![held; count],
                pauses: 0,
                leaving: false,
            }),
            changed: Condvar::new(),
            attention: (0..count).map(|_| AtomicBool::new(held)).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether vCPU `index` should look at the gate before it runs on.
    pub(crate) fn attention(&self, index: usize) -> bool {
        self.attention[index].load(Ordering::Acquire)
    }

    /// Calls vCPU `index` to look at the gate. The caller kicks it.
    pub(crate) fn call(&self, index: usize) {
        self.attention[index].store(true, Ordering::Release);
    }

    /// Called by the vCPU's thread: whether it need not rest. It need not look again then, until it is called.
    pub(crate) fn dismiss(&self, index: usize) -> bool {
        let inner = self.lock();
        let free = !inner.leaving && !inner.must_rest(index);
        if free {
            self.attention[index].store(false, Ordering::Release);
        }
        free
    }

    /// Called by the vCPU's thread, with no answer outstanding and the vCPU unlocked: rests as long as it
    /// must. Says whether to go on (false: end the thread).
    pub(crate) fn rest(&self, index: usize) -> bool {
        let mut inner = self.lock();
        loop {
            if inner.leaving {
                return false;
            }
            if !inner.must_rest(index) {
                inner.is[index] = Is::Running;
                self.attention[index].store(false, Ordering::Release);
                return true;
            }
            if inner.is[index] != Is::Resting {
                inner.is[index] = Is::Resting;
                self.changed.notify_all();
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Called by the vCPU's thread like [`Gate::rest`]: holds itself, at rest from now on.
    pub(crate) fn hold_self(&self, index: usize) {
        let mut inner = self.lock();
        inner.held[index] = true;
        inner.is[index] = Is::Resting;
        self.attention[index].store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Called by the vCPU's thread when it ends.
    pub(crate) fn gone(&self, index: usize) {
        self.lock().is[index] = Is::Gone;
        self.changed.notify_all();
    }

    fn attend(&self) {
        self.attention.iter().for_each(|flag| flag.store(true, Ordering::Release));
    }

    /// Asks every vCPU to rest. The caller kicks them, then waits with [`Gate::wait_at_rest`].
    pub(crate) fn hold_all(&self) {
        let mut inner = self.lock();
        inner.held.fill(true);
        self.attend();
    }

    /// Likewise, counted; undone by [`Gate::unpause`].
    pub(crate) fn pause(&self) {
        let mut inner = self.lock();
        inner.pauses += 1;
        self.attend();
    }

    /// Waits until every vCPU rests or is gone.
    pub(crate) fn wait_at_rest(&self) {
        let mut inner = self.lock();
        while inner.is.contains(&Is::Running) && !inner.leaving {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether vCPU `index` rests now.
    pub(crate) fn rests(&self, index: usize) -> bool {
        self.lock().is.get(index) == Some(&Is::Resting)
    }

    /// How many pauses there are.
    pub(crate) fn pauses(&self) -> usize {
        self.lock().pauses
    }

    /// Whether there is a pause and every vCPU rests.
    pub(crate) fn is_paused(&self) -> bool {
        let inner = self.lock();
        inner.pauses > 0 && !inner.is.contains(&Is::Running)
    }

    /// Whether every vCPU that is left is held.
    pub(crate) fn all_held(&self) -> bool {
        let inner = self.lock();
        let mut left = inner.is.iter().zip(&inner.held).filter(|(is, _)| **is != Is::Gone).peekable();
        left.peek().is_some() && left.all(|(_, held)| *held)
    }

    /// Whether a vCPU would run if the holds of `which` and `fewer` pauses were gone.
    pub(crate) fn would_run(&self, which: impl Fn(usize) -> bool, fewer: usize) -> bool {
        let inner = self.lock();
        let free = |n: usize| inner.is[n] != Is::Gone && (!inner.held[n] || which(n));
        inner.pauses <= fewer && (0..inner.is.len()).any(free)
    }

    /// Ends the hold of vCPU n if `which(n)`.
    pub(crate) fn release(&self, which: impl Fn(usize) -> bool) {
        let mut inner = self.lock();
        for (index, held) in inner.held.iter_mut().enumerate() {
            *held &= !which(index);
        }
        self.let_go(inner);
    }

    /// Undoes one [`Gate::pause`].
    pub(crate) fn unpause(&self) {
        let mut inner = self.lock();
        inner.pauses = inner.pauses.saturating_sub(1);
        self.let_go(inner);
    }

    fn let_go(&self, mut inner: MutexGuard<'_, Inner>) {
        for index in 0..inner.is.len() {
            if inner.is[index] == Is::Resting && !inner.must_rest(index) {
                inner.is[index] = Is::Running;
            }
        }
        self.changed.notify_all();
    }

    /// Sends every vCPU home, for good. The caller kicks them.
    pub(crate) fn leave(&self) {
        let mut inner = self.lock();
        inner.leaving = true;
        self.attend();
        self.changed.notify_all();
    }
}
