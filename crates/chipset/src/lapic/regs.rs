//! The local APIC's registers and rules, without locks or threads.

use wardian_irq::Delivery;
use wardian_time::{Grid, Nanos, Tick, TickConfig, TimeBase};

use super::message::{Ipi, Message, Mode};
use super::{LAPIC_BASE, MsrFault};
use crate::edge_ticks::tick_values;

/// Register numbers: the xAPIC offset divided by 16, the x2APIC MSR minus 800h (Intel SDM vol. 3A,
/// tables 11-1 and 11-6).
pub(crate) mod reg {
    pub(crate) const ID: u8 = 0x02;
    pub(crate) const VERSION: u8 = 0x03;
    pub(crate) const TPR: u8 = 0x08;
    pub(crate) const APR: u8 = 0x09;
    pub(crate) const PPR: u8 = 0x0a;
    pub(crate) const EOI: u8 = 0x0b;
    pub(crate) const RRD: u8 = 0x0c;
    pub(crate) const LDR: u8 = 0x0d;
    pub(crate) const DFR: u8 = 0x0e;
    pub(crate) const SVR: u8 = 0x0f;
    pub(crate) const ISR: u8 = 0x10;
    pub(crate) const TMR: u8 = 0x18;
    pub(crate) const IRR: u8 = 0x20;
    pub(crate) const ESR: u8 = 0x28;
    pub(crate) const ICR: u8 = 0x30;
    pub(crate) const ICR_HIGH: u8 = 0x31;
    pub(crate) const LVT_TIMER: u8 = 0x32;
    pub(crate) const LVT_LINT0: u8 = 0x35;
    pub(crate) const LVT_ERROR: u8 = 0x37;
    pub(crate) const INITIAL: u8 = 0x38;
    pub(crate) const CURRENT: u8 = 0x39;
    pub(crate) const DIVIDE: u8 = 0x3e;
    pub(crate) const SELF_IPI: u8 = 0x3f;
}

/// Version 14h, last LVT entry 5, EOI broadcast can be suppressed (bit 24).
const VERSION: u32 = 0x0105_0014;
const MASKED: u32 = 1 << 16;
/// Vector, enable, focus checking (obsolete), EOI broadcast suppression.
pub(super) const SVR_WRITABLE: u32 = 0x13ff;
const SVR_ENABLE: u32 = 1 << 8;
const SVR_NO_EOI_BROADCAST: u32 = 1 << 12;
/// ESR bits (Intel SDM vol. 3A, 11.5.3).
const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ILLEGAL_REGISTER: u32 = 1 << 7;
/// `IA32_APIC_BASE` bits.
pub(super) const BASE_BSP: u64 = 1 << 8;
pub(super) const BASE_X2APIC: u64 = 1 << 10;
pub(super) const BASE_ENABLE: u64 = 1 << 11;
pub(super) const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Indexes of LVT entries.
const TIMER: usize = 0;
const LINT0: usize = (reg::LVT_LINT0 - reg::LVT_TIMER) as usize;
const ERROR: usize = (reg::LVT_ERROR - reg::LVT_TIMER) as usize;
/// Writable bits of each LVT entry: timer, thermal, performance, LINT0, LINT1, error.
pub(super) const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
/// Read-only bits (delivery status, remote IRR): a write of ones to them is ignored.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

/// What is pending, as bits of [`LapicRegs::events`].
pub(crate) mod event {
    pub(crate) const INTERRUPT: u32 = 1;
    pub(crate) const NMI: u32 = 2;
    pub(crate) const INIT: u32 = 4;
    pub(crate) const STARTUP: u32 = 8;
}

/// What a register write asks of the world outside this APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Send this.
    Ipi(Ipi),
    /// Tell the IOAPIC that this level-triggered vector was handled.
    Eoi(u8),
    /// The APIC accepts interrupts from now on: lines that it refused before may be tried again.
    Enabled,
}

/// How the vCPU reaches its APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ApicMode {
    Disabled,
    XApic,
    X2Apic,
}

/// A set of vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vectors(pub(super) [u32; 8]);

impl Vectors {
    fn get(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] >> (vector & 31) & 1 != 0
    }

    /// Sets or clears; says what was there.
    fn put(&mut self, vector: u8, on: bool) -> bool {
        let was = self.get(vector);
        let (word, bit) = (&mut self.0[usize::from(vector >> 5)], 1 << (vector & 31));
        if on {
            *word |= bit;
        } else {
            *word &= !bit;
        }
        was
    }

    pub(crate) fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some((word as u32 * 32 + self.0[word].ilog2()) as u8)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = u8> {
        (0..=255u8).filter(|vector| self.get(*vector))
    }
}

/// The state of one local APIC.
#[derive(Clone, Debug)]
pub(crate) struct LapicRegs {
    pub(super) id: u32,
    pub(super) base: u64,
    pub(super) tpr: u8,
    /// Logical ID of the xAPIC; an x2APIC derives its own.
    pub(super) ldr: u8,
    pub(super) dfr: u32,
    pub(super) svr: u32,
    pub(crate) isr: Vectors,
    pub(crate) irr: Vectors,
    pub(crate) tmr: Vectors,
    /// What the ESR shows, and the errors since it was last written.
    pub(super) esr: u32,
    pub(super) errors: u32,
    pub(super) icr: u64,
    pub(super) lvt: [u32; 6],
    pub(super) initial: u32,
    pub(super) divide: u8,
    pub(crate) tick: Tick,
    /// `IA32_TSC_DEADLINE`; 0 when disarmed.
    pub(super) deadline: u64,
    /// Guest TSC of the vCPU minus that of the time base.
    pub(super) tsc_adjust: u64,
    /// Level of the LINT0 pin as last seen.
    pub(super) lint0: bool,
    pub(super) nmi: bool,
    pub(super) init: bool,
    pub(super) startup: Option<u8>,
    pub(super) wait_for_startup: bool,
}

impl LapicRegs {
    /// The state after power-up (Intel SDM vol. 3A, 11.4.7.1; the ID is the vCPU's number), but with LINT0 of the bootstrap processor
    /// in ExtINT mode, as firmware leaves it (virtual wire mode).
    pub(crate) fn new(id: u32, ticks: TickConfig) -> LapicRegs {
        let bsp = id == 0;
        let mut lvt = [MASKED; 6];
        if bsp {
            lvt[LINT0] = 7 << 8;
        }
        LapicRegs {
            id,
            base: LAPIC_BASE | BASE_ENABLE | if bsp { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: Vectors::default(),
            irr: Vectors::default(),
            tmr: Vectors::default(),
            esr: 0,
            errors: 0,
            icr: 0,
            lvt,
            initial: 0,
            divide: 0,
            tick: Tick::new(ticks),
            deadline: 0,
            tsc_adjust: 0,
            lint0: false,
            nmi: false,
            init: false,
            startup: None,
            wait_for_startup: !bsp,
        }
    }

    fn is_bsp(&self) -> bool {
        self.id == 0
    }

    /// Registers to their reset values; APIC base, pins, signals and the TSC stay.
    fn reset_registers(&mut self) {
        *self = LapicRegs {
            base: self.base,
            tsc_adjust: self.tsc_adjust,
            lint0: self.lint0,
            nmi: self.nmi,
            init: self.init,
            startup: self.startup,
            wait_for_startup: self.wait_for_startup,
            ..LapicRegs::new(self.id, self.tick.config())
        };
    }

    pub(crate) fn mode(&self) -> ApicMode {
        match (self.base & BASE_ENABLE != 0, self.base & BASE_X2APIC != 0) {
            (false, _) => ApicMode::Disabled,
            (true, false) => ApicMode::XApic,
            (true, true) => ApicMode::X2Apic,
        }
    }

    /// Whether the APIC page answers at the default address.
    pub(crate) fn decodes_page(&self) -> bool {
        self.mode() == ApicMode::XApic && self.base & BASE_ADDRESS == LAPIC_BASE
    }

    fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    // ---- Priorities and what is pending ----

    /// Processor priority (Intel SDM vol. 3A, 11.8.3.1).
    pub(crate) fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }

    /// Priority for lowest-priority arbitration; `None` if fixed interrupts are refused.
    pub(crate) fn arbitration(&self) -> Option<u8> {
        (self.mode() != ApicMode::Disabled && self.software_enabled()).then(|| self.ppr())
    }

    fn deliverable(&self) -> Option<u8> {
        self.irr.highest().filter(|vector| vector >> 4 > self.ppr() >> 4)
    }

    /// Whether the 8259 pair's request passes LINT0. A disabled APIC makes LINT0 the INTR pin.
    fn external(&self) -> bool {
        let lvt = self.lvt[LINT0];
        self.lint0
            && (self.mode() == ApicMode::Disabled || lvt & MASKED == 0 && Mode::of(lvt) == Mode::ExtInt)
    }

    pub(crate) fn events(&self) -> u32 {
        let mut events = 0;
        if self.external() || self.deliverable().is_some() {
            events |= event::INTERRUPT;
        }
        if self.nmi {
            events |= event::NMI;
        }
        if self.init {
            events |= event::INIT;
        }
        if self.startup.is_some() && !self.init {
            events |= event::STARTUP;
        }
        events
    }

    /// Takes a vector into service; `Err(())` when the 8259 pair is to be asked for it.
    pub(crate) fn acknowledge(&mut self, base: &TimeBase) -> Result<Option<u8>, ()> {
        if self.external() {
            return Err(());
        }
        let vector = self.deliverable();
        if let Some(vector) = vector {
            self.irr.put(vector, false);
            self.isr.put(vector, true);
            if self.tick.is_raised() && self.lvt[TIMER] as u8 == vector {
                self.tick.taken(base.moment());
                self.offer(base, false);
            }
        }
        Ok(vector)
    }

    pub(crate) fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// Takes the INIT and resets; a start-up IPI that came after the INIT stays.
    pub(crate) fn take_init(&mut self) -> bool {
        if !std::mem::take(&mut self.init) {
            return false;
        }
        self.reset_registers();
        self.nmi = false;
        self.wait_for_startup = !self.is_bsp();
        true
    }

    pub(crate) fn take_startup(&mut self) -> Option<u8> {
        if self.init {
            return None;
        }
        let page = self.startup.take();
        if page.is_some() {
            self.wait_for_startup = false;
        }
        page
    }

    pub(crate) fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    pub(crate) fn set_cr8(&mut self, priority: u8) {
        self.tpr = priority << 4;
    }

    // ---- Receiving ----

    fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    /// Whether the message's destination field names this APIC (Intel SDM vol. 3A, 11.6.2, 11.12.10).
    pub(crate) fn matches(&self, message: &Message) -> bool {
        if message.is_broadcast() {
            return true;
        }
        let dest = message.dest;
        match (message.logical, self.mode()) {
            (false, _) => dest == self.id,
            (true, ApicMode::X2Apic) => {
                let own = self.x2apic_ldr();
                dest >> 16 == own >> 16 && dest & own & 0xffff != 0
            }
            (true, _) => {
                let Ok(dest) = u8::try_from(dest) else { return false };
                if self.dfr >> 28 == 0xf {
                    dest & self.ldr != 0
                } else {
                    (dest >> 4 == self.ldr >> 4 || dest >> 4 == 0xf) && dest & self.ldr & 0xf != 0
                }
            }
        }
    }

    /// Receives a message that [`matches`](Self::matches).
    pub(crate) fn accept(&mut self, message: &Message) -> Delivery {
        if self.mode() == ApicMode::Disabled {
            return Delivery::Masked;
        }
        let merge = |was: bool| if was { Delivery::Coalesced } else { Delivery::Accepted };
        match message.mode {
            Mode::Fixed | Mode::Lowest => self.accept_vector(message.vector, message.level),
            Mode::Nmi => merge(std::mem::replace(&mut self.nmi, true)),
            Mode::Init => {
                self.startup = None;
                merge(std::mem::replace(&mut self.init, true))
            }
            // Only a processor that waits for it takes a start-up IPI.
            Mode::Startup if self.wait_for_startup || self.init && !self.is_bsp() => {
                let was = self.startup.is_some();
                self.startup.get_or_insert(message.vector);
                merge(was)
            }
            Mode::Startup | Mode::Smi | Mode::ExtInt | Mode::Reserved => Delivery::Masked,
        }
    }

    fn accept_vector(&mut self, vector: u8, level: bool) -> Delivery {
        if vector < 16 {
            self.error(RECEIVE_ILLEGAL_VECTOR);
            return Delivery::Masked;
        }
        if !self.software_enabled() {
            return Delivery::Masked;
        }
        self.tmr.put(vector, level);
        if self.irr.put(vector, true) { Delivery::Coalesced } else { Delivery::Accepted }
    }

    fn error(&mut self, bit: u32) {
        self.errors |= bit;
        let lvt = self.lvt[ERROR];
        if lvt & MASKED == 0 && self.software_enabled() {
            if lvt as u8 >= 16 {
                self.tmr.put(lvt as u8, false);
                self.irr.put(lvt as u8, true);
            } else {
                self.errors |= RECEIVE_ILLEGAL_VECTOR;
            }
        }
    }

    /// The LINT0 pin shows `level`. In ExtINT mode the level itself counts; the other modes take edges.
    pub(crate) fn set_lint0(&mut self, level: bool) {
        let rose = level && !self.lint0;
        self.lint0 = level;
        let lvt = self.lvt[LINT0];
        if rose && self.mode() != ApicMode::Disabled && lvt & MASKED == 0 {
            match Mode::of(lvt) {
                Mode::Fixed => drop(self.accept_vector(lvt as u8, false)),
                Mode::Nmi => self.nmi = true,
                _ => {}
            }
        }
    }

    // ---- Timer ----

    pub(super) fn is_periodic(&self) -> bool {
        self.lvt[TIMER] >> 17 & 3 == 1
    }

    pub(super) fn is_tsc_deadline(&self) -> bool {
        self.lvt[TIMER] >> 17 & 3 == 2
    }

    /// log2 of the divisor (Intel SDM vol. 3A, figure 11-10).
    fn divide_shift(&self) -> u32 {
        (u32::from(self.divide >> 1 & 4 | self.divide & 3) + 1) & 7
    }

    /// `count` timer ticks; the timer's input clock is 1 GHz, so that is exact.
    pub(super) fn span(&self, count: u32) -> Nanos {
        Nanos(u64::from(count) << self.divide_shift())
    }

    /// Lets the counter run down from `count`.
    fn run_from(&mut self, base: &TimeBase, count: u32) {
        let first = base.timeline().saturating_add(self.span(count));
        if count == 0 {
            self.tick.stop();
        } else if self.is_periodic() {
            self.tick.start_periodic(Grid::of_nanos(first, self.span(self.initial)));
        } else {
            self.tick.start_once(first);
        }
    }

    /// The point of the time line at which the timer is due next.
    pub(crate) fn next_tick(&self) -> Option<Nanos> {
        self.tick.next()
    }

    /// The count at `now` of the time line.
    fn current(&self, now: Nanos) -> u32 {
        let Some(next) = self.tick.next().filter(|_| !self.is_tsc_deadline()) else {
            return 0;
        };
        let left = if self.is_periodic() {
            // However late the tick or the clock are, the count is that of some period.
            let period = i128::from(self.span(self.initial).0.max(1));
            ((i128::from(next.0) - i128::from(now.0) - 1).rem_euclid(period) + 1) as u64
        } else {
            next.saturating_sub(now).0
        };
        left.div_ceil(1 << self.divide_shift()).min(u64::from(u32::MAX)) as u32
    }

    /// A due tick becomes an interrupt, unless the LVT entry masks it. Called on the vCPU's thread;
    /// `slept`: the vCPU was halted when the tick came due.
    pub(crate) fn offer(&mut self, base: &TimeBase, slept: bool) {
        if self.is_tsc_deadline() && self.deadline > self.tsc(base) {
            if self.tick.is_due(base.timeline()) {
                // Nanoseconds are coarser than the TSC: a few ticks may be left.
                self.arm_deadline(base);
            }
            return;
        }
        if !self.tick.offer(base.moment(), slept) {
            return;
        }
        if self.is_tsc_deadline() {
            self.deadline = 0;
        }
        if let Some((at, back)) = self.tick.apparent() {
            base.show(at, back);
        }
        let lvt = self.lvt[TIMER];
        let delivery =
            if lvt & MASKED == 0 { self.accept_vector(lvt as u8, false) } else { Delivery::Masked };
        match delivery {
            Delivery::Accepted => {}
            Delivery::Coalesced => self.tick.coalesced(),
            Delivery::Masked => self.tick.refuse(),
        }
    }

    /// The vCPU's own guest TSC.
    pub(super) fn tsc(&self, base: &TimeBase) -> u64 {
        base.tsc().wrapping_add(self.tsc_adjust)
    }

    fn arm_deadline(&mut self, base: &TimeBase) {
        let tsc = self.tsc(base);
        if self.deadline == 0 {
            self.tick.stop();
        } else if tsc >= self.deadline {
            self.tick.start_once(base.timeline());
            self.offer(base, true);
        } else {
            let left = Nanos::from_ticks(self.deadline - tsc, base.tsc_hz());
            self.tick.start_once(base.timeline().saturating_add(left));
        }
    }

    fn write_lvt_timer(&mut self, value: u32, base: &TimeBase) {
        let was_deadline = self.is_tsc_deadline();
        let was_periodic = self.is_periodic();
        let now = base.timeline();
        let current = self.current(now);
        self.lvt[TIMER] = value;
        if was_deadline != self.is_tsc_deadline() {
            self.tick.stop();
            self.deadline = 0;
            self.initial = 0;
        } else if was_periodic != self.is_periodic() && current != 0 {
            self.run_from(base, current);
        }
        self.tick.unmask(base.timeline());
        self.offer(base, true);
    }

    /// `IA32_TSC_DEADLINE` (6E0h; Intel SDM vol. 3A, 11.5.4.1).
    pub(crate) fn read_deadline(&self) -> u64 {
        if self.is_tsc_deadline() { self.deadline } else { 0 }
    }

    pub(crate) fn write_deadline(&mut self, value: u64, base: &TimeBase) {
        if self.is_tsc_deadline() && self.mode() != ApicMode::Disabled {
            self.deadline = value;
            self.arm_deadline(base);
        }
    }

    pub(crate) fn set_tsc_adjust(&mut self, adjust: u64, base: &TimeBase) {
        self.tsc_adjust = adjust;
        if self.is_tsc_deadline() {
            self.arm_deadline(base);
        }
    }

    // ---- Registers ----

    fn read(&self, register: u8, base: &TimeBase) -> Option<u32> {
        Some(match register {
            reg::ID if self.mode() == ApicMode::X2Apic => self.id,
            reg::ID => self.id << 24,
            reg::VERSION => VERSION,
            reg::TPR => self.tpr.into(),
            reg::APR | reg::PPR => self.ppr().into(),
            reg::EOI | reg::RRD => 0,
            reg::LDR if self.mode() == ApicMode::X2Apic => self.x2apic_ldr(),
            reg::LDR => u32::from(self.ldr) << 24,
            reg::DFR => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..reg::TMR => self.isr.0[usize::from(register - reg::ISR)],
            reg::TMR..reg::IRR => self.tmr.0[usize::from(register - reg::TMR)],
            reg::IRR..reg::ESR => self.irr.0[usize::from(register - reg::IRR)],
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH => (self.icr >> 32) as u32,
            reg::LVT_TIMER..=reg::LVT_ERROR => self.lvt[usize::from(register - reg::LVT_TIMER)],
            reg::INITIAL => self.initial,
            reg::CURRENT => self.current(base.timeline()),
            reg::DIVIDE => self.divide.into(),
            _ => return None,
        })
    }

    /// Writes a register; `None` in the outer option when there is no such register.
    fn write(&mut self, register: u8, value: u32, base: &TimeBase) -> Option<Option<Effect>> {
        let mut effect = None;
        match register {
            reg::TPR => self.tpr = value as u8,
            reg::EOI => effect = self.eoi(),
            reg::LDR => self.ldr = (value >> 24) as u8,
            reg::DFR => self.dfr = value | 0x0fff_ffff,
            reg::SVR => {
                let was = self.software_enabled();
                self.svr = value & SVR_WRITABLE;
                if !self.software_enabled() {
                    self.lvt.iter_mut().for_each(|lvt| *lvt |= MASKED);
                } else if !was {
                    effect = Some(Effect::Enabled);
                }
            }
            reg::ESR => self.esr = std::mem::take(&mut self.errors),
            reg::ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & 0x000c_cfff);
                effect = self.send(self.icr);
            }
            reg::ICR_HIGH => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                let entry = usize::from(register - reg::LVT_TIMER);
                let mut value = value & LVT_WRITABLE[entry];
                if !self.software_enabled() {
                    value |= MASKED;
                }
                if entry == TIMER {
                    self.write_lvt_timer(value, base);
                } else {
                    self.lvt[entry] = value;
                }
            }
            reg::INITIAL if !self.is_tsc_deadline() => {
                self.initial = value;
                self.run_from(base, value);
            }
            reg::DIVIDE => {
                let now = base.timeline();
                let current = self.current(now);
                self.divide = value as u8 & 0xb;
                if self.tick.next().is_some() && !self.is_tsc_deadline() {
                    self.run_from(base, current.max(1));
                }
            }
            // Read-only registers swallow writes.
            reg::ID | reg::VERSION | reg::APR | reg::PPR | reg::RRD | reg::ISR..reg::ESR => {}
            reg::INITIAL | reg::CURRENT => {}
            _ => return None,
        }
        Some(effect)
    }

    fn eoi(&mut self) -> Option<Effect> {
        let vector = self.isr.highest()?;
        self.isr.put(vector, false);
        (self.tmr.get(vector) && self.svr & SVR_NO_EOI_BROADCAST == 0).then_some(Effect::Eoi(vector))
    }

    fn send(&mut self, icr: u64) -> Option<Effect> {
        let ipi = Ipi::from_icr(icr, self.mode() == ApicMode::X2Apic)?;
        if matches!(ipi.message.mode, Mode::Fixed | Mode::Lowest) && ipi.message.vector < 16 {
            self.error(SEND_ILLEGAL_VECTOR);
            return None;
        }
        Some(Effect::Ipi(ipi))
    }

    /// A 32-bit read in the xAPIC page.
    pub(crate) fn page_read(&mut self, register: u8, base: &TimeBase) -> u32 {
        self.read(register, base).unwrap_or_else(|| {
            self.error(ILLEGAL_REGISTER);
            0
        })
    }

    /// A 32-bit write in the xAPIC page.
    pub(crate) fn page_write(&mut self, register: u8, value: u32, base: &TimeBase) -> Option<Effect> {
        self.write(register, value, base).unwrap_or_else(|| {
            self.error(ILLEGAL_REGISTER);
            None
        })
    }

    /// RDMSR of 800h + `register`.
    pub(crate) fn msr_read(&self, register: u8, base: &TimeBase) -> Result<u64, MsrFault> {
        if self.mode() != ApicMode::X2Apic {
            return Err(MsrFault);
        }
        match register {
            reg::ICR => Ok(self.icr),
            reg::APR | reg::EOI | reg::RRD | reg::DFR | reg::ICR_HIGH => Err(MsrFault),
            _ => self.read(register, base).map(u64::from).ok_or(MsrFault),
        }
    }

    /// WRMSR of 800h + `register`.
    pub(crate) fn msr_write(
        &mut self,
        register: u8,
        value: u64,
        base: &TimeBase,
    ) -> Result<Option<Effect>, MsrFault> {
        let allowed: u64 = match register {
            _ if self.mode() != ApicMode::X2Apic => return Err(MsrFault),
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            // Focus checking (bit 9) is obsolete, but software that sets it is not refused.
            reg::SVR => 0x13ff,
            // Bit 12, delivery status in xAPIC mode, is ignored.
            reg::ICR => 0xffff_ffff_000c_dfff,
            reg::LVT_TIMER if value >> 17 & 3 == 3 => return Err(MsrFault),
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                (LVT_WRITABLE[usize::from(register - reg::LVT_TIMER)] | LVT_READ_ONLY).into()
            }
            reg::INITIAL => 0xffff_ffff,
            reg::DIVIDE => 0xb,
            _ => return Err(MsrFault),
        };
        if value & !allowed != 0 {
            return Err(MsrFault);
        }
        match register {
            reg::ICR => {
                self.icr = value & !(1 << 12);
                Ok(self.send(self.icr))
            }
            reg::SELF_IPI => Ok(self.send(value | 1 << 18)),
            _ => self.write(register, value as u32, base).ok_or(MsrFault),
        }
    }

    /// `IA32_APIC_BASE` (1Bh).
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// Writes `IA32_APIC_BASE`: only the transitions of Intel SDM vol. 3A, 11.12.5 are legal.
    pub(crate) fn set_base(&mut self, value: u64) -> Result<(), MsrFault> {
        if value & !(BASE_ADDRESS | BASE_ENABLE | BASE_X2APIC | BASE_BSP) != 0 {
            return Err(MsrFault);
        }
        let old = self.mode();
        let new = match (value & BASE_ENABLE != 0, value & BASE_X2APIC != 0) {
            (false, true) => return Err(MsrFault),
            (false, false) => ApicMode::Disabled,
            (true, false) => ApicMode::XApic,
            (true, true) => ApicMode::X2Apic,
        };
        if matches!((old, new), (ApicMode::Disabled, ApicMode::X2Apic) | (ApicMode::X2Apic, ApicMode::XApic))
        {
            return Err(MsrFault);
        }
        self.base = value & !BASE_BSP | self.base & BASE_BSP;
        if new == ApicMode::Disabled && old != new {
            self.reset_registers();
        }
        Ok(())
    }

    /// Named values, for `inspect`.
    pub(crate) fn inspect(&self, base: &TimeBase) -> Vec<(String, String)> {
        let list =
            |set: &Vectors| set.iter().map(|vector| format!("{vector:#x}")).collect::<Vec<_>>().join(" ");
        let mut values: Vec<_> = [
            ("mode", format!("{:?}", self.mode())),
            ("base", format!("{:#x}", self.base)),
            ("tpr", format!("{:#x}", self.tpr)),
            ("ppr", format!("{:#x}", self.ppr())),
            ("svr", format!("{:#x}", self.svr)),
            ("logical", format!("ldr {:#x} dfr {:#x}", self.ldr, self.dfr)),
            ("isr", list(&self.isr)),
            ("irr", list(&self.irr)),
            ("tmr", list(&self.tmr)),
            ("esr", format!("{:#x} (since then {:#x})", self.esr, self.errors)),
            ("icr", format!("{:#x}", self.icr)),
            ("lvt", format!("{:x?}", self.lvt)),
            (
                "timer",
                format!(
                    "initial {} current {} divisor {} next {:?} tsc-deadline {:#x}",
                    self.initial,
                    self.current(base.timeline()),
                    1u32 << self.divide_shift(),
                    self.tick.next(),
                    self.deadline,
                ),
            ),
            (
                "pending",
                format!(
                    "nmi {} init {} startup {:?} waits-for-startup {} lint0 {}",
                    self.nmi, self.init, self.startup, self.wait_for_startup, self.lint0
                ),
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        values.extend(tick_values("ticks", &self.tick));
        values
    }
}
