//! The High Precision Event Timers (Intel, IA-PC HPET Specification 1.0a): one 64-bit counter of 100 MHz,
//! three timers, all periodic-capable, legacy replacement routing; no FSB delivery.
//!
//! The counter is a function of guest time; each register access reads guest time once and every timer
//! sees the same "now". Timer 0 and 1 take the places of the PIT and the RTC under legacy replacement.

mod persist;
mod regs;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use regs::{OUTPUTS, Regs, TIMERS};
use wardian_bus::{Access, Device};
use wardian_irq::{Delivery, Gsi, IrqChip, Line, MsiMessage, TickId, TickLink, TickPort, TickSource};
use wardian_time::{Nanos, Tick, TickConfig, TimeBase, Timer, TimerHandler, TimerQueue};

use crate::edge_ticks::EdgeTicks;
use crate::layout::{GSI_HPET, GSI_RTC, GSI_TIMER};
use crate::wire::{Output, Wire, lock};

pub use persist::{HpetState, HpetTimerState};

/// Low half of the capabilities register, which the ACPI table repeats: revision 1, three timers, 64 bits
/// wide, legacy replacement capable, vendor 8086h.
pub const CAPABILITIES: u32 = 0x8086_0000 | 1 << 15 | 1 << 13 | (3 - 1) << 8 | 1;
/// Period of the counter in ns.
pub const PERIOD_NS: u64 = 10;
/// Shortest period of a periodic timer, in ticks: 100 us.
pub const MIN_PERIOD_TICKS: u64 = 100_000 / PERIOD_NS;

/// Whether the HPET has taken over the interrupts of PIT and RTC. Made once per machine, shared by them.
#[derive(Clone, Debug, Default)]
pub struct LegacyRouting(Arc<AtomicBool>);

impl LegacyRouting {
    /// Whether it has.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, on: bool) {
        self.0.store(on, Ordering::Release);
    }

    /// `line`, which stays down while the HPET has taken over: for the PIT.
    #[must_use]
    pub fn gate(&self, line: Line) -> Line {
        let gsi = line.gsi();
        Line::new(Arc::new(Gate { line, routing: self.clone() }), gsi)
    }
}

struct Gate {
    line: Line,
    routing: LegacyRouting,
}

impl IrqChip for Gate {
    fn set_line(&self, _gsi: Gsi, level: bool) -> Delivery {
        if self.routing.is_on() { Delivery::Masked } else { self.line.set(level) }
    }

    fn signal_msi(&self, _message: MsiMessage) -> Delivery {
        Delivery::Masked
    }

    fn attach_ticks(&self, source: Weak<dyn TickSource>) -> Option<TickId> {
        self.line.chip().attach_ticks(source)
    }

    fn tick_due(&self, id: TickId, point: Nanos) {
        self.line.chip().tick_due(id, point);
    }

    fn tick_edge(&self, id: TickId, gsi: Gsi) -> Delivery {
        self.line.chip().tick_edge(id, if self.routing.is_on() { NOWHERE } else { gsi })
    }

    fn tick_link(&self, id: TickId) -> TickLink {
        self.line.chip().tick_link(id)
    }

    fn set_tick_link(&self, id: TickId, link: TickLink) {
        self.line.chip().set_tick_link(id, link);
    }
}

/// An input that no chip has.
const NOWHERE: Gsi = Gsi(u32::MAX);

/// The device. Its lock is above the timer queue's only.
pub struct Hpet {
    regs: Mutex<Regs>,
    base: Arc<TimeBase>,
    timer: OnceLock<Timer>,
    ticks: OnceLock<[Arc<HpetTick>; TIMERS]>,
    /// The system timer's line, the RTC's and [`GSI_HPET`].
    outputs: [Output; OUTPUTS],
    routing: LegacyRouting,
}

impl Hpet {
    /// A stopped HPET on `queue`'s time that raises inputs of `chip`, says in `routing` which, and treats
    /// ticks as `ticks` says.
    #[must_use]
    pub fn new(
        queue: &Arc<TimerQueue>,
        chip: &Arc<dyn IrqChip>,
        routing: LegacyRouting,
        ticks: TickConfig,
    ) -> Arc<Hpet> {
        Self::build(queue, chip, routing, Regs::new(ticks))
    }

    fn build(
        queue: &Arc<TimerQueue>,
        chip: &Arc<dyn IrqChip>,
        routing: LegacyRouting,
        regs: Regs,
    ) -> Arc<Hpet> {
        let output = |gsi| Output::new(Line::new(Arc::clone(chip), gsi));
        let [a, b, c, d] = GSI_HPET;
        let hpet = Arc::new(Hpet {
            regs: Mutex::new(regs),
            base: Arc::clone(queue.base()),
            timer: OnceLock::new(),
            ticks: OnceLock::new(),
            outputs: [GSI_TIMER, GSI_RTC, a, b, c, d].map(output),
            routing,
        });
        let handler: Weak<Hpet> = Arc::downgrade(&hpet);
        let _ = hpet.timer.set(queue.timer(handler));
        let _ = hpet.ticks.set(std::array::from_fn(|index| HpetTick::new(&hpet, index, chip)));
        hpet
    }

    fn change<R>(&self, change: impl FnOnce(&mut Regs, Nanos, Nanos) -> R) -> R {
        // Guest time is read once: every timer sees the same.
        let now = self.base.now();
        let line = now.saturating_add(self.base.lag());
        let (result, wires, due): (R, [Wire; OUTPUTS], [Option<Nanos>; TIMERS]) = {
            let mut regs = lock(&self.regs);
            regs.advance(now, line);
            let result = change(&mut regs, now, line);
            let wires = regs.settle();
            self.routing.set(regs.legacy());
            let due = regs.hand_over(line);
            if let Some(timer) = self.timer.get() {
                timer.set_line(regs.deadline());
            }
            (result, wires, due)
        };
        for (output, wire) in self.outputs.iter().zip(wires) {
            output.publish(wire);
        }
        for (due, tick) in due.into_iter().zip(self.ticks.get().into_iter().flatten()) {
            if let Some(point) = due {
                tick.port().due(point);
            }
        }
        result
    }
}

impl TimerHandler for Hpet {
    fn expired(&self, _now: Nanos) {
        self.change(|_, _, _| ());
    }
}

/// One timer of an [`Hpet`], as its ticks see it.
struct HpetTick {
    hpet: Weak<Hpet>,
    base: Arc<TimeBase>,
    index: usize,
    port: TickPort,
}

impl HpetTick {
    fn new(hpet: &Arc<Hpet>, index: usize, chip: &Arc<dyn IrqChip>) -> Arc<HpetTick> {
        Arc::new_cyclic(|this: &Weak<HpetTick>| HpetTick {
            hpet: Arc::downgrade(hpet),
            base: Arc::clone(&hpet.base),
            index,
            port: TickPort::new(Arc::clone(chip), this.clone() as Weak<dyn TickSource>),
        })
    }
}

impl EdgeTicks for HpetTick {
    fn port(&self) -> &TickPort {
        &self.port
    }

    fn base(&self) -> &TimeBase {
        &self.base
    }

    fn with_tick<R>(&self, change: impl FnOnce(&mut Tick) -> R) -> (R, Option<Gsi>) {
        match self.hpet.upgrade() {
            Some(hpet) => hpet.change(|regs, now, line| {
                (regs.with_tick(self.index, now, line, change), regs.edge_input(self.index))
            }),
            None => (change(&mut Tick::stopped()), None),
        }
    }
}

impl TickSource for HpetTick {
    fn offer(&self, slept: bool) {
        let Some(hpet) = self.hpet.upgrade() else { return };
        let level = {
            let mut regs = lock(&hpet.regs);
            regs.take_over(self.index);
            regs.is_level(self.index)
        };
        if !level {
            return self.offer_ticks(slept);
        }
        let now = self.base.moment();
        let apparent = lock(&hpet.regs).offer_level(self.index, now, slept);
        if let Some((at, back)) = apparent {
            self.base.show(at, back);
        }
        hpet.change(|_, _, _| ());
    }

    fn taken(&self) {
        self.tick_taken();
    }

    fn retry(&self) {
        self.tick_unmasked();
    }
}

impl Device for Hpet {
    fn name(&self) -> &str {
        "hpet"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        let shift = at.offset as usize % 8;
        let value = if at.offset & !7 == regs::COUNTER {
            // The clock source: nothing is due because somebody looks at the time.
            let now = self.base.read();
            lock(&self.regs).counter(now)
        } else {
            self.change(|regs, _, _| regs.read(at.offset & !7))
        };
        let bytes = value.to_le_bytes();
        for (byte, value) in data.iter_mut().zip(bytes[shift..].iter().chain(std::iter::repeat(&0))) {
            *byte = *value;
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        // Registers take naturally aligned accesses of 4 and 8 bytes (specification, 2.3.2).
        let aligned = at.offset.is_multiple_of(data.len().max(1) as u64);
        if !aligned || !(data.len() == 4 || data.len() == 8) {
            return;
        }
        let shift = at.offset % 8 * 8;
        let value = data.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)) << shift;
        let mask = (u64::MAX >> (64 - 8 * data.len())) << shift;
        self.change(|regs, now, line| regs.write(at.offset & !7, value, mask, now, line));
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let now = self.base.now();
        lock(&self.regs).inspect(now)
    }
}
