//! What is saved of the 8259 pair. Its inputs are those of the IOAPIC and stand with that; its request to the
//! bootstrap processor follows from its registers.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use wardian_state::check::{Wrong, at_most, ensure, only_bits};
use wardian_state::{Record, Refused};

use super::{CASCADE, Chip, ELCR_MASTER, ELCR_SLAVE, Init, Pair, Pic};

/// Where a saved chip is in its initialisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitState {
    /// Done.
    Done,
    /// It expects ICW2,
    Icw2,
    /// ICW3,
    Icw3,
    /// or ICW4.
    Icw4,
}

/// One 8259A as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicChipState {
    /// Interrupt request register.
    pub irr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// Edge/level control register.
    pub elcr: u8,
    /// All inputs are level-triggered, by ICW1.
    pub all_level: bool,
    /// Vector of input 0.
    pub vector_base: u8,
    /// Input of highest priority.
    pub top: u8,
    /// Initialisation.
    pub init: InitState,
    /// By ICW1: there is no other chip.
    pub single: bool,
    /// By ICW1: ICW4 follows.
    pub wants_icw4: bool,
    /// By ICW4: automatic EOI.
    pub auto_eoi: bool,
    /// Rotation at automatic EOI.
    pub rotates: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// By ICW4: special fully nested mode.
    pub fully_nested: bool,
    /// The command port shows the in-service register.
    pub reads_isr: bool,
    /// The next read is a poll.
    pub polls: bool,
}

/// The pair as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// The chip of ISA interrupts 0-7.
    pub master: PicChipState,
    /// The chip of ISA interrupts 8-15.
    pub slave: PicChipState,
}

impl Record for PicState {
    const KIND: &'static str = "pic";
    const VERSION: u16 = 1;
}

impl Chip {
    fn save(&self) -> PicChipState {
        PicChipState {
            irr: self.irr,
            imr: self.imr,
            isr: self.isr,
            elcr: self.elcr,
            all_level: self.all_level,
            vector_base: self.base,
            top: self.top,
            init: match self.init {
                Init::Done => InitState::Done,
                Init::Icw2 => InitState::Icw2,
                Init::Icw3 => InitState::Icw3,
                Init::Icw4 => InitState::Icw4,
            },
            single: self.single,
            wants_icw4: self.wants_icw4,
            auto_eoi: self.auto_eoi,
            rotates: self.rotate_on_auto_eoi,
            special_mask: self.special_mask,
            fully_nested: self.fully_nested,
            reads_isr: self.read_isr,
            polls: self.poll,
        }
    }
}

impl PicChipState {
    fn restore(&self, master: bool, lines: u8) -> Result<Chip, Wrong> {
        only_bits("elcr", self.elcr, if master { ELCR_MASTER } else { ELCR_SLAVE })?;
        only_bits("vector_base", self.vector_base, 0xf8u8)?;
        at_most("top", self.top, 7u8)?;
        let levels = if self.all_level { 0xff } else { self.elcr };
        ensure((self.irr ^ lines) & levels == 0, "irr", || {
            format!("{:#04x}, where the level-triggered inputs of {levels:#04x} show {lines:#04x}", self.irr)
        })?;
        Ok(Chip {
            master,
            irr: self.irr,
            imr: self.imr,
            isr: self.isr,
            lines,
            elcr: self.elcr,
            all_level: self.all_level,
            base: self.vector_base,
            top: self.top,
            init: match self.init {
                InitState::Done => Init::Done,
                InitState::Icw2 => Init::Icw2,
                InitState::Icw3 => Init::Icw3,
                InitState::Icw4 => Init::Icw4,
            },
            single: self.single,
            wants_icw4: self.wants_icw4,
            auto_eoi: self.auto_eoi,
            rotate_on_auto_eoi: self.rotates,
            special_mask: self.special_mask,
            fully_nested: self.fully_nested,
            read_isr: self.reads_isr,
            poll: self.polls,
        })
    }
}

impl Pic {
    /// What to save.
    pub(crate) fn save(&self) -> PicState {
        let pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        PicState { master: pair.master.save(), slave: pair.slave.save() }
    }

    /// The pair that was saved as `state`, whose ISA interrupts are at the levels of `isa`.
    pub(crate) fn restore(state: &PicState, isa: u16) -> Result<Pic, Refused> {
        let pair = Pair::restore(state, isa).map_err(Wrong::in_record::<PicState>)?;
        let pic = Pic::new();
        pic.output.store(pair.master.request().is_some(), Ordering::Release);
        Ok(Pic { pair: Mutex::new(pair), ..pic })
    }
}

impl Pair {
    fn restore(state: &PicState, isa: u16) -> Result<Pair, Wrong> {
        let slave = state.slave.restore(false, (isa >> 8) as u8).map_err(|e| e.within("slave"))?;
        let cascade = u8::from(slave.request().is_some()) << CASCADE;
        let master = state.master.restore(true, isa as u8 & !(1 << CASCADE) | cascade);
        Ok(Pair { master: master.map_err(|e| e.within("master"))?, slave })
    }
}
