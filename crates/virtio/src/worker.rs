//! A thread per queue, and the mailbox through which it is told what to do.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use wardian_bus::pci::MsiX;
use wardian_memory::GuestMemory;

use crate::VirtioDevice;
use crate::ring::{Broken, Ring};

/// `VIRTIO_MSI_NO_VECTOR`.
pub(crate) const NO_VECTOR: u16 = 0xffff;
/// Interrupt status bits (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// A ring to serve, and the features that the driver took.
pub(crate) struct Active {
    pub ring: Ring,
    pub features: u64,
}

#[derive(Default)]
struct State {
    kicked: bool,
    sleeping: bool,
    pause: bool,
    parked: bool,
    quit: bool,
    /// A reset that the worker has not seen yet.
    resetting: bool,
    /// The ring to serve from now on; `Some(None)` for none.
    next: Option<Option<Active>>,
    /// Where the ring was when the worker last slept.
    position: Option<(u16, u16)>,
}

/// The mailbox of one queue's worker. Its lock is a leaf, and never held while a request is handled.
#[derive(Default)]
pub(crate) struct Slot {
    state: Mutex<State>,
    changed: Condvar,
    /// Something else than a kick is in the mailbox.
    attention: AtomicBool,
    /// The queue's MSI-X vector.
    pub vector: AtomicU16,
}

impl Slot {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There may be requests.
    pub(crate) fn kick(&self) {
        let mut state = self.state();
        state.kicked = true;
        if state.sleeping {
            self.changed.notify_all();
        }
    }

    fn command(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.attention.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Serves `active` from now on.
    pub(crate) fn activate(&self, active: Active) {
        self.command(|state| {
            state.next = Some(Some(active));
            state.kicked = true;
        });
    }

    /// Lets go of the ring; done when [`Slot::reset_done`].
    pub(crate) fn reset(&self) {
        self.vector.store(NO_VECTOR, Ordering::Release);
        self.command(|state| {
            state.next = Some(None);
            state.kicked = false;
            state.resetting = true;
        });
    }

    pub(crate) fn reset_done(&self) -> bool {
        !self.state().resetting
    }

    /// Waits for a reset to be done.
    pub(crate) fn wait_reset(&self) {
        drop(self.changed.wait_while(self.state(), |state| state.resetting));
    }

    /// Asks the worker to stop between two requests.
    pub(crate) fn pause(&self) {
        self.command(|state| state.pause = true);
    }

    /// Waits until it has.
    pub(crate) fn wait_parked(&self) {
        drop(self.changed.wait_while(self.state(), |state| state.pause && !state.parked && !state.quit));
    }

    /// Ends a pause.
    pub(crate) fn resume(&self) {
        self.command(|state| state.pause = false);
    }

    /// Ends the worker.
    pub(crate) fn quit(&self) {
        self.command(|state| state.quit = true);
    }

    /// Indexes of the next available and used entry, as of the last time that the worker slept.
    pub(crate) fn position(&self) -> Option<(u16, u16)> {
        self.state().position
    }

    /// Waits for work; false when it is time to go.
    fn wait(&self, active: &mut Option<Active>) -> bool {
        let mut state = self.state();
        loop {
            self.attention.store(false, Ordering::Release);
            if state.quit {
                return false;
            }
            if let Some(next) = state.next.take() {
                *active = next;
            }
            state.position = active.as_ref().map(|active| active.ring.position());
            let was = (state.resetting, state.parked);
            (state.resetting, state.parked) = (false, state.pause);
            if was != (false, state.pause) {
                self.changed.notify_all();
            }
            if !state.pause && state.kicked && active.is_some() {
                state.kicked = false;
                return true;
            }
            state.sleeping = true;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.sleeping = false;
        }
    }

    fn attention(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }

    /// Whether the ring at hand is no longer the one to serve.
    fn superseded(&self) -> bool {
        self.attention() && self.state().next.is_some()
    }
}

/// Wakes the worker of one queue, for a device that has got work from elsewhere.
#[derive(Clone)]
pub struct Bell(Arc<Slot>);

impl Bell {
    pub(crate) fn new(slot: &Arc<Slot>) -> Bell {
        Bell(Arc::clone(slot))
    }

    /// Wakes it. Never blocks.
    pub fn ring(&self) {
        self.0.kick();
    }
}

/// What the transport and the workers of one device share.
pub(crate) struct Shared {
    pub device: Arc<dyn VirtioDevice>,
    pub mem: GuestMemory,
    pub msix: MsiX,
    pub slots: Vec<Arc<Slot>>,
    pub config_vector: AtomicU16,
    pub isr: AtomicU8,
    /// A ring made no sense: `DEVICE_NEEDS_RESET`.
    pub broken: AtomicBool,
}

impl Shared {
    fn interrupt(&self, vector: &AtomicU16, bit: u8) {
        let vector = vector.load(Ordering::Acquire);
        if vector == NO_VECTOR || self.msix.signal(vector).is_none() {
            self.isr.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Gives up on a ring and tells the driver (virtio 1.2, 2.1.2).
    pub(crate) fn break_down(&self, queue: usize) {
        if !self.broken.swap(true, Ordering::AcqRel) {
            tracing::warn!(
                "The guest's driver of {} made a ring of queue {queue} that makes no sense; the device waits for a reset",
                self.device.name()
            );
        }
        self.interrupt(&self.config_vector, ISR_CONFIG);
    }

    /// The life of the worker of queue `index`.
    pub(crate) fn work(&self, index: usize) {
        let slot = &self.slots[index];
        let mut active = None;
        while slot.wait(&mut active) {
            let Some(work) = &mut active else { continue };
            if self.serve(index, slot, work).is_err() && !slot.superseded() {
                active = None;
                self.break_down(index);
            }
        }
    }

    /// Serves requests until there are none, none can be handled, or something else is to be done.
    fn serve(&self, index: usize, slot: &Slot, work: &mut Active) -> Result<(), Broken> {
        loop {
            work.ring.mute()?;
            loop {
                if slot.attention() {
                    // Whatever it is: look at the ring again afterwards.
                    slot.kick();
                    return Ok(());
                }
                if !self.device.ready(index) {
                    return Ok(());
                }
                let Some(chain) = work.ring.pop()? else { break };
                let head = chain.head;
                let written = self.device.handle(index, work.features, &self.mem, chain);
                if slot.superseded() {
                    return Ok(());
                }
                work.ring.push(head, written)?;
                if work.ring.wants_interrupt()? {
                    self.interrupt(&slot.vector, ISR_QUEUE);
                }
            }
            if !work.ring.unmute()? {
                return Ok(());
            }
        }
    }
}
