//! Interrupts: what a device holds to raise one, and what a vCPU asks to get one.
//!
//! *Comes in*: lines going up and down, message-signalled interrupts. *Goes out*: vectors, NMIs, INITs
//! and start-up IPIs, one [`LocalInterrupts`] per vCPU, and kicks.
//!
//! **Architecture Invariant:** an engine sees only [`LocalInterrupts`]; a device sees only [`Line`] and
//! [`MsiMessage`]. **Architecture Invariant:** nothing here blocks.
//!
//! **API Boundary:** everything in this room.

mod link;

use std::sync::{Arc, Weak};

use wardian_time::Nanos;

pub use link::{Awaited, Due, TickLink};

/// A global system interrupt: an input of the IOAPIC; 0-15 also reach the 8259 pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

/// What became of an interrupt request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is now pending at a local APIC or PIC.
    Accepted,
    /// It was pending already and merged with that.
    Coalesced,
    /// Its line is masked or no vCPU takes it.
    Masked,
}

/// A message-signalled interrupt (PCI 3.0, 6.8.1; Intel SDM vol. 3A, 11.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// The interrupt chips of one machine: IOAPIC, PICs and local APICs, wherever they are made.
pub trait IrqChip: Send + Sync {
    /// Sets the level of input `gsi`.
    fn set_line(&self, gsi: Gsi, level: bool) -> Delivery;
    /// Delivers a message-signalled interrupt.
    fn signal_msi(&self, message: MsiMessage) -> Delivery;
    /// Takes note of a timer that wants its ticks to become interrupts on the thread of a vCPU, and to
    /// know when the guest takes them: its number. `None` where the chip cannot do that.
    fn attach_ticks(&self, _source: Weak<dyn TickSource>) -> Option<TickId> {
        None
    }
    /// Timer `id` has something to offer that came due at `point` of the time line: its vCPU calls
    /// [`TickSource::offer`] soon.
    fn tick_due(&self, _id: TickId, _point: Nanos) {}
    /// An edge on input `gsi` for timer `id`, which learns when the guest takes it.
    fn tick_edge(&self, _id: TickId, gsi: Gsi) -> Delivery {
        let delivery = self.set_line(gsi, true);
        self.set_line(gsi, false);
        delivery
    }
    /// How far the tick of timer `id` is, to be saved.
    fn tick_link(&self, _id: TickId) -> TickLink {
        TickLink::default()
    }
    /// How far the tick of timer `id` was when it was saved; its vCPU does not run yet.
    fn set_tick_link(&self, _id: TickId, _link: TickLink) {}
}

/// Number of a [`TickSource`] at its chip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TickId(pub u8);

/// A timer whose interrupts count time for the guest. No lock of the chip is held in its calls.
pub trait TickSource: Send + Sync {
    /// Now a tick can become an interrupt: called on the thread of the vCPU that takes the machine's timer
    /// interrupts, before it runs guest code on. `slept`: it was halted when the tick came due.
    fn offer(&self, slept: bool);
    /// The guest took the interrupt of the last [`IrqChip::tick_edge`].
    fn taken(&self);
    /// The guest changed what it masks: an interrupt that was refused may be tried again.
    fn retry(&self);
}

/// A timer's way to the interrupt chip.
pub struct TickPort {
    chip: Arc<dyn IrqChip>,
    source: Weak<dyn TickSource>,
    id: Option<TickId>,
}

impl TickPort {
    /// Makes `source` known to `chip`.
    #[must_use]
    pub fn new(chip: Arc<dyn IrqChip>, source: Weak<dyn TickSource>) -> TickPort {
        let id = chip.attach_ticks(Weak::clone(&source));
        TickPort { chip, source, id }
    }

    /// Something that came due at `point` is to be offered. Where the chip has no such thread, that happens here and now.
    pub fn due(&self, point: Nanos) {
        match self.id {
            Some(id) => self.chip.tick_due(id, point),
            None => {
                if let Some(source) = self.source.upgrade() {
                    source.offer(true);
                }
            }
        }
    }

    /// An edge on input `gsi`; [`TickSource::taken`] follows when the guest takes it. Where the chip does
    /// not know that, an accepted interrupt counts as taken.
    pub fn edge(&self, gsi: Gsi) -> Delivery {
        self.chip.tick_edge(self.id.unwrap_or(TickId(0)), gsi)
    }

    /// How far the tick is, to be saved.
    #[must_use]
    pub fn link(&self) -> TickLink {
        self.id.map_or_else(TickLink::default, |id| self.chip.tick_link(id))
    }

    /// How far the tick was when it was saved.
    pub fn set_link(&self, link: TickLink) {
        if let Some(id) = self.id {
            self.chip.set_tick_link(id, link);
        }
    }

    /// Whether [`TickSource::taken`] follows an edge.
    #[must_use]
    pub fn tells_taken(&self) -> bool {
        self.id.is_some()
    }
}

impl std::fmt::Debug for TickPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TickPort").field(&self.id).finish()
    }
}

/// One input of the chip, held by one device.
#[derive(Clone)]
pub struct Line {
    chip: Arc<dyn IrqChip>,
    gsi: Gsi,
}

impl Line {
    /// The input `gsi` of `chip`.
    #[must_use]
    pub fn new(chip: Arc<dyn IrqChip>, gsi: Gsi) -> Line {
        Line { chip, gsi }
    }

    /// The way of a timer to the chip of this line.
    #[must_use]
    pub fn ticks(&self, source: Weak<dyn TickSource>) -> TickPort {
        TickPort::new(Arc::clone(&self.chip), source)
    }

    /// The chip.
    #[must_use]
    pub fn chip(&self) -> &Arc<dyn IrqChip> {
        &self.chip
    }

    /// Which input this is.
    #[must_use]
    pub fn gsi(&self) -> Gsi {
        self.gsi
    }

    /// Sets the level.
    pub fn set(&self, level: bool) -> Delivery {
        self.chip.set_line(self.gsi, level)
    }

    /// Raises and lowers the line: an edge.
    pub fn pulse(&self) -> Delivery {
        let delivery = self.chip.set_line(self.gsi, true);
        self.chip.set_line(self.gsi, false);
        delivery
    }
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Line").field(&self.gsi).finish()
    }
}

/// Makes a vCPU thread look at its [`LocalInterrupts`] soon: out of translated or guest code, or out of
/// its sleep in HLT. Callable from any thread, cheap when repeated, never lost.
pub trait Kick: Send + Sync {
    /// Kicks.
    fn kick(&self);
    /// Whether the vCPU sleeps in HLT now and did so at `point` of the time line already.
    fn slept_at(&self, _point: Nanos) -> bool {
        false
    }
}

/// What waits for a vCPU at its local APIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PendingEvents {
    /// [`LocalInterrupts::acknowledge`] would return a vector now (priorities considered).
    pub interrupt: bool,
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// An INIT.
    pub init: bool,
    /// A start-up IPI.
    pub startup: bool,
}

impl PendingEvents {
    /// Whether anything waits.
    #[must_use]
    pub fn any(self) -> bool {
        self.interrupt || self.nmi || self.init || self.startup
    }
}

/// The vCPU's side of its local APIC (with the 8259 behind LINT0).
pub trait LocalInterrupts: Send + Sync {
    /// What waits. Lock-free when nothing does.
    fn pending(&self) -> PendingEvents;
    /// Takes the highest-priority deliverable vector into service (or ExtINT from the PIC).
    fn acknowledge(&self) -> Option<u8>;
    /// Takes a pending NMI.
    fn take_nmi(&self) -> bool;
    /// Takes a pending INIT; the APIC has reset itself (except its ID).
    fn take_init(&self) -> bool;
    /// Takes a pending start-up IPI: its vector (real-mode page number).
    fn take_startup(&self) -> Option<u8>;
    /// Task priority as CR8 shows it (TPR bits 7:4).
    fn cr8(&self) -> u8;
    /// Writes CR8.
    fn set_cr8(&self, priority: u8);
    /// `IA32_APIC_BASE`.
    fn apic_base(&self) -> u64;
    /// Whom to kick when something becomes pending. Called once, before the vCPU runs.
    fn attach(&self, kick: Arc<dyn Kick>);
}

/// A vCPU that nothing ever interrupts: for machines without interrupt chips and for tests of engines.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl LocalInterrupts for Quiet {
    fn pending(&self) -> PendingEvents {
        PendingEvents::default()
    }
    fn acknowledge(&self) -> Option<u8> {
        None
    }
    fn take_nmi(&self) -> bool {
        false
    }
    fn take_init(&self) -> bool {
        false
    }
    fn take_startup(&self) -> Option<u8> {
        None
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _priority: u8) {}
    fn apic_base(&self) -> u64 {
        0xfee0_0900
    }
    fn attach(&self, _kick: Arc<dyn Kick>) {}
}
