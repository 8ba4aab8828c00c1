//! How the ticks of PIT, RTC and HPET come to vCPU 0's thread, and how their timers learn what the guest
//! does with them.
//!
//! A timer that is due does not raise its line from the timer thread: it is asked again by vCPU 0 just
//! before that runs guest code, when it is known whether the host let it run meanwhile. That is where a tick
//! policy decides.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use wardian_irq::{Awaited, Delivery, Due, Gsi, TickId, TickLink, TickSource};

use crate::wire::lock;

/// Most timers; one bit each.
const SOURCES: usize = 32;

/// The timers of one chip. Lock order: the list of sources is a leaf.
#[derive(Default)]
pub(super) struct Ticks {
    sources: [OnceLock<Weak<dyn TickSource>>; SOURCES],
    attached: Mutex<usize>,
    /// To be offered; of those, the ones that came due while vCPU 0 slept.
    due: AtomicU32,
    slept: AtomicU32,
    /// Refused because the guest masks their interrupt.
    refused: AtomicU32,
    /// Raised and not taken, and what tells that they are.
    raised: AtomicU32,
    awaited: [AtomicU32; SOURCES],
}

fn pack(awaited: Awaited) -> u32 {
    let byte = |value: Option<u8>| value.map_or(0, |value| 0x100 | u32::from(value));
    byte(awaited.vector) << 16 | byte(awaited.isa)
}

fn unpack(packed: u32) -> Awaited {
    let byte = |value: u32| (value & 0x100 != 0).then_some(value as u8);
    Awaited { vector: byte(packed >> 16), isa: byte(packed) }
}

/// The numbers of the bits that are set.
fn bits(mut set: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lowest = set.trailing_zeros();
        set &= set.wrapping_sub(1);
        (lowest < 32).then_some(lowest as usize)
    })
}

impl Ticks {
    pub(super) fn attach(&self, source: Weak<dyn TickSource>) -> Option<TickId> {
        let mut attached = lock(&self.attached);
        self.sources.get(*attached)?.set(source).ok()?;
        *attached += 1;
        Some(TickId((*attached - 1) as u8))
    }

    fn source(&self, id: usize) -> Option<Arc<dyn TickSource>> {
        self.sources.get(id)?.get()?.upgrade()
    }

    fn bit(id: TickId) -> u32 {
        1u32.checked_shl(id.0.into()).unwrap_or(0)
    }

    /// Timer `id` is due; the caller kicks vCPU 0 afterwards.
    pub(super) fn set_due(&self, id: TickId, slept: bool) {
        if slept {
            self.slept.fetch_or(Self::bit(id), Ordering::AcqRel);
        }
        self.due.fetch_or(Self::bit(id), Ordering::AcqRel);
    }

    /// Lets the timers that are due offer their ticks; on vCPU 0's thread.
    pub(super) fn offer(&self) {
        if self.due.load(Ordering::Acquire) == 0 {
            return;
        }
        let due = self.due.swap(0, Ordering::AcqRel);
        let slept = self.slept.fetch_and(!due, Ordering::AcqRel);
        for id in bits(due) {
            if let Some(source) = self.source(id) {
                source.offer(slept >> id & 1 != 0);
            }
        }
    }

    /// Raises timer `id`'s interrupt by `edge`, which the guest is expected to take as `awaited`.
    pub(super) fn raise(&self, id: TickId, awaited: Awaited, edge: impl FnOnce() -> Delivery) -> Delivery {
        let Some(cell) = self.awaited.get(usize::from(id.0)) else { return edge() };
        cell.store(pack(awaited), Ordering::Release);
        self.raised.fetch_or(Self::bit(id), Ordering::AcqRel);
        let delivery = edge();
        if delivery == Delivery::Masked {
            self.raised.fetch_and(!Self::bit(id), Ordering::AcqRel);
            self.refused.fetch_or(Self::bit(id), Ordering::AcqRel);
        }
        delivery
    }

    /// Whether [`Ticks::acknowledged`] can find anything.
    pub(super) fn any_raised(&self) -> bool {
        self.raised.load(Ordering::Acquire) != 0
    }

    /// A vCPU took an interrupt, and `is` tells whether it is the one of a timer that expects this.
    pub(super) fn acknowledged(&self, is: impl Fn(Awaited) -> bool) {
        for id in bits(self.raised.load(Ordering::Acquire)) {
            if !is(unpack(self.awaited[id].load(Ordering::Acquire))) {
                continue;
            }
            let bit = 1 << id;
            if self.raised.fetch_and(!bit, Ordering::AcqRel) & bit != 0
                && let Some(source) = self.source(id)
            {
                source.taken();
            }
        }
    }

    /// How far the tick of timer `id` is. No vCPU runs.
    pub(super) fn link(&self, id: TickId) -> TickLink {
        let is = |set: &AtomicU32| set.load(Ordering::Acquire) & Self::bit(id) != 0;
        let due = match (is(&self.due), is(&self.slept)) {
            (false, _) => Due::No,
            (true, false) => Due::Waits,
            (true, true) => Due::WaitsAsleep,
        };
        let awaited = self.awaited.get(usize::from(id.0)).filter(|_| is(&self.raised));
        TickLink {
            due,
            refused: is(&self.refused),
            awaited: awaited.map(|cell| unpack(cell.load(Ordering::Acquire))),
        }
    }

    /// How far the tick of timer `id` was when it was saved. No vCPU runs.
    pub(super) fn set_link(&self, id: TickId, link: TickLink) {
        let set = |set: &AtomicU32, on: bool| {
            if on {
                set.fetch_or(Self::bit(id), Ordering::AcqRel);
            } else {
                set.fetch_and(!Self::bit(id), Ordering::AcqRel);
            }
        };
        if let (Some(cell), Some(awaited)) = (self.awaited.get(usize::from(id.0)), link.awaited) {
            cell.store(pack(awaited), Ordering::Release);
        }
        set(&self.raised, link.awaited.is_some());
        set(&self.refused, link.refused);
        set(&self.slept, link.due == Due::WaitsAsleep);
        set(&self.due, link.due != Due::No);
    }

    /// The guest may have unmasked something.
    pub(super) fn retry(&self) {
        if self.refused.load(Ordering::Acquire) == 0 {
            return;
        }
        for id in bits(self.refused.swap(0, Ordering::AcqRel)) {
            if let Some(source) = self.source(id) {
                source.retry();
            }
        }
    }
}

/// ISA interrupt and IOAPIC input of a global system interrupt.
pub(super) fn wiring(gsi: Gsi) -> (Option<u8>, usize) {
    match gsi.0 {
        0 | super::TIMER_PIN => (Some(0), super::TIMER_PIN as usize),
        pin @ ..16 => (Some(pin as u8), pin as usize),
        pin => (None, pin as usize),
    }
}
