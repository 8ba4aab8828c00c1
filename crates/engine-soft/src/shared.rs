//! What the vCPUs of one machine tell each other: code that was written, pages that became code, kicks.
//!
//! No vCPU ever waits for another, but for the rare one that must be [alone](crate::exclusive). When a vCPU translates from a page for the first time it asks the others to give
//! up write entries for it; one that still had such an entry answers by declaring the page written, so a store that
//! slipped in between costs a re-translation and is never missed.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::exclusive::{Exclusive, Presence};
use wardian_irq::Kick;
use wardian_memory::CodeListener;

/// Attention bit: the mailbox has requests.
pub const REQUESTS: u32 = 1;
/// Attention bit: kicked from outside.
pub const KICKED: u32 = 2;
/// Attention bit: the vCPU itself wants to look at its interrupts again.
pub const RECHECK: u32 = 4;

/// Attention bit: another vCPU wants to be alone.
pub const STOP: u32 = 8;

/// Requests kept for a vCPU that sleeps, before they become [`Request::Everything`].
const KEPT: usize = 4096;

/// What one vCPU asks of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Forget translations of these 64-byte granules of a RAM page.
    Written { page: usize, granules: u64 },
    /// Take write permission for this RAM page out of the TLB.
    BecameCode { page: usize },
    /// Too many requests to remember: forget every translation and every TLB entry, and have the others forget their
    /// translations.
    Everything,
    /// Forget every translation.
    ForgetCode,
}

#[derive(Debug, Default)]
struct Letters {
    requests: Vec<Request>,
    /// Address of the owner's attention word, while it lives.
    attention: usize,
}

/// One vCPU's mailbox. Its lock is a leaf.
#[derive(Debug, Default)]
pub struct Mailbox {
    letters: Mutex<Letters>,
    presence: Presence,
}

impl Mailbox {
    fn lock(&self) -> std::sync::MutexGuard<'_, Letters> {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(letters: &Letters, bit: u32) {
        if letters.attention != 0 {
            // SAFETY: the owner clears the address under this lock before its context goes away.
            unsafe { (*(letters.attention as *const AtomicU32)).fetch_or(bit, Ordering::AcqRel) };
        }
    }

    /// Says where the owner's attention word is; null when it goes away.
    pub fn attach(&self, attention: *const AtomicU32) {
        self.lock().attention = attention as usize;
    }

    fn post(&self, request: Request) {
        let mut letters = self.lock();
        if letters.requests.len() >= KEPT {
            letters.requests.clear();
            letters.requests.push(Request::Everything);
        } else if letters.requests.first() != Some(&Request::Everything)
            && letters.requests.last() != Some(&request)
        {
            letters.requests.push(request);
        }
        Self::signal(&letters, REQUESTS);
    }

    /// Takes all requests.
    pub fn take(&self, into: &mut Vec<Request>) {
        into.append(&mut self.lock().requests);
    }
}

impl Kick for Mailbox {
    fn kick(&self) {
        Self::signal(&self.lock(), KICKED);
    }
}

/// The mailboxes of all vCPUs of one machine.
#[derive(Debug, Default)]
pub struct Shared {
    boxes: Mutex<Vec<Arc<Mailbox>>>,
    exclusive: Exclusive,
}

impl Shared {
    /// Adds a vCPU.
    pub fn join(&self) -> Arc<Mailbox> {
        let mailbox = Arc::new(Mailbox::default());
        self.boxes.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&mailbox));
        mailbox
    }

    fn others(&self, own: &Arc<Mailbox>) -> Vec<Arc<Mailbox>> {
        let boxes = self.boxes.lock().unwrap_or_else(PoisonError::into_inner);
        boxes.iter().filter(|mailbox| !Arc::ptr_eq(own, mailbox)).cloned().collect()
    }

    /// The vCPU goes into guest code; waits while another is alone there.
    pub fn enter(&self, own: &Mailbox) {
        self.exclusive.enter(&own.presence);
    }

    /// The vCPU leaves guest code.
    pub fn leave(&self, own: &Mailbox) {
        self.exclusive.leave(&own.presence);
    }

    /// The vCPU is alone in guest code from now on, until [`Shared::end_alone`].
    pub fn begin_alone(&self, own: &Arc<Mailbox>) {
        let others = self.others(own);
        let ask = || others.iter().for_each(|mailbox| Mailbox::signal(&mailbox.lock(), STOP));
        let inside = || others.iter().any(|mailbox| mailbox.presence.is_inside());
        self.exclusive.begin(&own.presence, ask, inside);
    }

    /// The others go on.
    pub fn end_alone(&self) {
        self.exclusive.end();
    }

    /// Posts to everybody, or to everybody but `except`.
    pub fn post(&self, request: Request, except: Option<&Arc<Mailbox>>) {
        let boxes = self.boxes.lock().unwrap_or_else(PoisonError::into_inner);
        for mailbox in boxes.iter() {
            if !except.is_some_and(|own| Arc::ptr_eq(own, mailbox)) {
                mailbox.post(request);
            }
        }
    }
}

impl CodeListener for Shared {
    fn code_written(&self, page: usize, granules: u64) {
        self.post(Request::Written { page, granules }, None);
    }
}

#[cfg(test)]
mod tests {
    use super::{KEPT, Mailbox, Request};

    #[test]
    fn a_sleeping_vcpu_keeps_a_bounded_number_of_requests() {
        let mailbox = Mailbox::default();
        for page in 0..3 * KEPT {
            mailbox.post(Request::Written { page, granules: 1 });
        }
        let mut taken = Vec::new();
        mailbox.take(&mut taken);
        assert_eq!(taken, [Request::Everything]);
        mailbox.post(Request::BecameCode { page: 1 });
        taken.clear();
        mailbox.take(&mut taken);
        assert_eq!(taken, [Request::BecameCode { page: 1 }]);
    }
}
