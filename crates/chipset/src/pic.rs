//! The pair of 8259A interrupt controllers of a PC, with the edge/level registers of the ISA bridge
//! (Intel 8259A data sheet; 82371AB data sheet, 4.1.12). The master's INT output goes to LINT0 of vCPU 0.

pub(crate) mod persist;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wardian_irq::Delivery;

/// The master's input to which the slave is wired.
const CASCADE: u8 = 2;
/// Inputs that can be level-triggered: IRQ 0, 1, 2, 8 and 13 are always edges.
const ELCR_MASTER: u8 = 0xf8;
const ELCR_SLAVE: u8 = 0xde;

/// Where a chip is in its initialisation sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Init {
    #[default]
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// The state of one 8259A.
#[derive(Clone, Debug, Default)]
struct Chip {
    master: bool,
    irr: u8,
    imr: u8,
    isr: u8,
    lines: u8,
    /// Level-triggered inputs by ELCR, and all of them by ICW1.
    elcr: u8,
    all_level: bool,
    base: u8,
    /// Input of highest priority.
    top: u8,
    init: Init,
    single: bool,
    wants_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    fully_nested: bool,
    read_isr: bool,
    poll: bool,
}

impl Chip {
    fn new(master: bool) -> Chip {
        // Masked until software initialises it, as firmware leaves it.
        Chip { master, imr: 0xff, ..Chip::default() }
    }

    fn is_level(&self, input: u8) -> bool {
        self.all_level || self.elcr >> input & 1 != 0
    }

    /// Rank of the first set bit from the input of highest priority on; 8 if none is set.
    fn rank(&self, set: u8) -> u32 {
        set.rotate_right(self.top.into()).trailing_zeros()
    }

    fn input_of(&self, rank: u32) -> u8 {
        (rank as u8 + self.top) & 7
    }

    /// The input that requests service now.
    fn request(&self) -> Option<u8> {
        let requested = self.rank(self.irr & !self.imr);
        let mut busy = self.isr;
        if self.special_mask {
            busy &= !self.imr;
        }
        if self.fully_nested && self.master {
            busy &= !(1 << CASCADE);
        }
        (requested < self.rank(busy)).then(|| self.input_of(requested))
    }

    fn set_line(&mut self, input: u8, level: bool) -> Delivery {
        let bit = 1 << input;
        let (was_line, was_irr) = (self.lines & bit != 0, self.irr & bit != 0);
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if self.is_level(input) {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if level && !was_line {
            self.irr |= bit;
        }
        if !level || self.imr & bit != 0 {
            Delivery::Masked
        } else if was_irr || was_line {
            Delivery::Coalesced
        } else {
            Delivery::Accepted
        }
    }

    /// An INTA cycle or poll takes `input`.
    fn take(&mut self, input: u8) {
        let bit = 1 << input;
        if !self.is_level(input) {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.top = (input + 1) & 7;
            }
        } else {
            self.isr |= bit;
        }
    }

    /// The input that a non-specific EOI ends.
    fn in_service(&self) -> Option<u8> {
        let busy = if self.special_mask { self.isr & !self.imr } else { self.isr };
        (busy != 0).then(|| self.input_of(self.rank(busy)))
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            let levels = if value & 8 != 0 { 0xff } else { self.elcr };
            *self = Chip {
                master: self.master,
                lines: self.lines,
                elcr: self.elcr,
                base: self.base,
                irr: self.lines & levels,
                all_level: value & 8 != 0,
                single: value & 2 != 0,
                wants_icw4: value & 1 != 0,
                init: Init::Icw2,
                ..Chip::default()
            };
        } else if value & 8 != 0 {
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
        } else {
            let ended = match value >> 5 {
                1 | 5 => self.in_service(),
                3 | 7 => Some(value & 7),
                _ => None,
            };
            if let Some(input) = ended {
                self.isr &= !(1 << input);
            }
            match value >> 5 {
                0 => self.rotate_on_auto_eoi = false,
                4 => self.rotate_on_auto_eoi = true,
                5 | 7 => self.top = ended.map_or(self.top, |input| (input + 1) & 7),
                6 => self.top = (value + 1) & 7,
                _ => {}
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        let last = if self.wants_icw4 { Init::Icw4 } else { Init::Done };
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.base = value & 0xf8;
                self.init = if self.single { last } else { Init::Icw3 };
            }
            // The wiring of the pair is fixed.
            Init::Icw3 => self.init = last,
            Init::Icw4 => {
                self.fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                self.init = Init::Done;
            }
        }
    }

    /// Takes the request of a poll command: bit 7 and the input, or 0.
    fn take_poll(&mut self) -> u8 {
        self.poll = false;
        match self.request() {
            Some(input) => {
                self.take(input);
                0x80 | input
            }
            None => 0,
        }
    }

    fn inspect(&self) -> String {
        format!("{self:x?}")
    }
}

#[derive(Debug)]
struct Pair {
    master: Chip,
    slave: Chip,
}

impl Pair {
    /// The slave's output as it is now reaches the master's input.
    fn cascade(&mut self) {
        let out = self.slave.request().is_some();
        self.master.set_line(CASCADE, out);
    }

    /// The slave's output falls during an INTA cycle, so that a further request is a new edge.
    fn recascade(&mut self) {
        self.master.set_line(CASCADE, false);
        self.cascade();
    }

    /// The INTA cycles. A request that is gone meanwhile reads as input 7, without an in-service bit.
    fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.master.request() else {
            return self.master.base + 7;
        };
        self.master.take(input);
        if input != CASCADE {
            return self.master.base + input;
        }
        let slave = self.slave.request();
        if let Some(input) = slave {
            self.slave.take(input);
        }
        self.recascade();
        self.slave.base + slave.unwrap_or(7)
    }
}

/// The pair. Its lock is a leaf.
#[derive(Debug)]
pub(crate) struct Pic {
    pair: Mutex<Pair>,
    /// The master's INT output, kept up to date under the lock.
    output: Arc<AtomicBool>,
}

/// What a port of the pair is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    Command { master: bool },
    Data { master: bool },
    Elcr { master: bool },
}

impl Pic {
    pub(crate) fn new() -> Pic {
        let pair = Pair { master: Chip::new(true), slave: Chip::new(false) };
        Pic { pair: Mutex::new(pair), output: Arc::default() }
    }

    /// The INT output.
    pub(crate) fn output(&self) -> &Arc<AtomicBool> {
        &self.output
    }

    /// Does something to the pair and updates the output; the caller lets LINT0 look at it afterwards.
    fn with<R>(&self, with: impl FnOnce(&mut Pair) -> R) -> R {
        let mut pair: MutexGuard<'_, Pair> = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        let result = with(&mut pair);
        pair.cascade();
        self.output.store(pair.master.request().is_some(), Ordering::Release);
        result
    }

    /// Sets the level of ISA interrupt `irq`, 0-15 (2 is the cascade and has no line).
    pub(crate) fn set_line(&self, irq: u8, level: bool) -> Delivery {
        self.with(|pair| match irq {
            CASCADE | 16.. => Delivery::Masked,
            8.. => pair.slave.set_line(irq - 8, level),
            _ => pair.master.set_line(irq, level),
        })
    }

    /// The processor's interrupt acknowledge: the vector.
    pub(crate) fn acknowledge(&self) -> u8 {
        self.with(Pair::acknowledge)
    }

    /// The vector of ISA interrupt `irq`.
    pub(crate) fn vector(&self, irq: u8) -> u8 {
        self.with(|pair| {
            let chip = if irq < 8 { &pair.master } else { &pair.slave };
            chip.base | irq & 7
        })
    }

    pub(crate) fn read(&self, port: Port) -> u8 {
        self.with(|pair| {
            let (Port::Command { master } | Port::Data { master } | Port::Elcr { master }) = port;
            let chip = if master { &mut pair.master } else { &mut pair.slave };
            match port {
                Port::Elcr { .. } => chip.elcr,
                _ if chip.poll => {
                    let word = chip.take_poll();
                    if !master {
                        pair.recascade();
                    }
                    word
                }
                Port::Command { .. } if chip.read_isr => chip.isr,
                Port::Command { .. } => chip.irr,
                Port::Data { .. } => chip.imr,
            }
        })
    }

    pub(crate) fn write(&self, port: Port, value: u8) {
        self.with(|pair| {
            let (Port::Command { master } | Port::Data { master } | Port::Elcr { master }) = port;
            let chip = if master { &mut pair.master } else { &mut pair.slave };
            match port {
                Port::Command { .. } => {
                    chip.write_command(value);
                    if master && value & 0x10 != 0 {
                        // The slave's request, if there is one, is not lost by the master's reset.
                        chip.lines &= !(1 << CASCADE);
                    }
                }
                Port::Data { .. } => chip.write_data(value),
                Port::Elcr { .. } => {
                    chip.elcr = value & if master { ELCR_MASTER } else { ELCR_SLAVE };
                    chip.irr = chip.irr & !chip.elcr | chip.lines & chip.elcr;
                }
            }
        });
    }

    /// Named values, for `inspect`.
    pub(crate) fn inspect(&self) -> Vec<(String, String)> {
        let pair = self.pair.lock().unwrap_or_else(PoisonError::into_inner);
        vec![
            ("master".to_owned(), pair.master.inspect()),
            ("slave".to_owned(), pair.slave.inspect()),
            ("output".to_owned(), self.output.load(Ordering::Acquire).to_string()),
        ]
    }
}
