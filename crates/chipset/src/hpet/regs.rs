//! The registers and the state machine behind them; pure, with "now" as an argument.

use wardian_irq::Gsi;
use wardian_time::{Grid, Moment, Nanos, Tick, TickConfig};

use super::{CAPABILITIES, MIN_PERIOD_TICKS, PERIOD_NS};
use crate::edge_ticks::tick_values;
use crate::layout::{GSI_HPET, GSI_RTC, GSI_TIMER};
use crate::wire::Wire;

/// Offset of the main counter.
pub(super) const COUNTER: u64 = 0xf0;
const CAPABILITY: u64 = 0x00;
const CONFIGURATION: u64 = 0x10;
const STATUS: u64 = 0x20;
pub(super) const TIMERS: usize = 3;
/// Lines: system timer, RTC and the four of [`GSI_HPET`].
pub(super) const OUTPUTS: usize = 6;

pub(super) const ENABLE: u64 = 1 << 0;
pub(super) const LEGACY: u64 = 1 << 1;

pub(super) const T_LEVEL: u64 = 1 << 1;
const T_INTERRUPT: u64 = 1 << 2;
pub(super) const T_PERIODIC: u64 = 1 << 3;
const T_PERIODIC_CAP: u64 = 1 << 4;
const T_64BIT_CAP: u64 = 1 << 5;
pub(super) const T_SET_VALUE: u64 = 1 << 6;
const T_32BIT: u64 = 1 << 8;
pub(super) const T_ROUTE_SHIFT: u32 = 9;
pub(super) const T_ROUTE: u64 = 0x1f << T_ROUTE_SHIFT;
pub(super) const T_WRITABLE: u64 = T_LEVEL | T_INTERRUPT | T_PERIODIC | T_SET_VALUE | T_32BIT | T_ROUTE;

/// A 32-bit comparator this much behind the counter was meant to be in the past: 1/1024 s. Any further
/// behind, it is meant to come after the counter has wrapped.
const TINY_SPAN: u64 = 1_000_000_000 / PERIOD_NS / 1024;

pub(super) fn routes() -> u64 {
    GSI_HPET.iter().fold(0, |mask, gsi| mask | 1 << gsi.0)
}

/// One timer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Comparator {
    pub(super) config: u64,
    /// The comparator in the 64 bits of the counter, also in 32-bit mode.
    pub(super) at: u64,
    /// Ticks between interrupts in periodic mode as the guest set it; 0 until it has.
    pub(super) period: u64,
    /// The counter has not reached `at` since that was set.
    pub(super) armed: bool,
    pub(super) tick: Tick,
    /// The tick is due and vCPU 0 was asked to let it be offered.
    pub(super) handed: bool,
}

impl Comparator {
    fn is(self, bit: u64) -> bool {
        self.config & bit != 0
    }

    /// Ticks between interrupts, if they repeat: not less than 100 us, not more than half the counter's range.
    pub(super) fn repeats(self) -> Option<u64> {
        let period = self.period & self.width_mask();
        (self.is(T_PERIODIC) && period != 0).then(|| period.clamp(MIN_PERIOD_TICKS, self.width_mask() >> 1))
    }

    fn width_mask(self) -> u64 {
        if self.is(T_32BIT) { 0xffff_ffff } else { u64::MAX }
    }

    /// Ticks from `counter` to the comparator, `None` if it lies in the past.
    fn ahead(self, counter: u64) -> Option<u64> {
        let distance = self.at.wrapping_sub(counter);
        // All ones is the reset value, never a time in the past.
        (self.at == u64::MAX || distance <= i64::MAX as u64).then_some(distance)
    }

    /// Takes `value` as the comparator: in 32-bit mode, the point near `counter` with these low bits.
    fn set(&mut self, value: u64, counter: u64) {
        self.armed = true;
        if !self.is(T_32BIT) {
            self.at = value;
            return;
        }
        let ahead = (value as u32).wrapping_sub(counter as u32);
        let behind = u64::from(ahead.wrapping_neg());
        self.at = if (1..=TINY_SPAN).contains(&behind) {
            counter.wrapping_sub(behind)
        } else {
            counter.wrapping_add(u64::from(ahead))
        };
    }

    /// Moves a periodic comparator that the counter has reached on to its next period.
    fn move_on(&mut self, counter: u64) {
        let elapsed = counter.wrapping_sub(self.at);
        if let Some(period) = self.repeats()
            && self.ahead(counter).is_none_or(|ahead| ahead == 0)
        {
            self.at = self.at.wrapping_add((elapsed / period + 1).wrapping_mul(period));
        }
    }

    /// Ticks to the next match of a comparator that has not matched at `counter` or has been taken note of.
    fn next(self, counter: u64) -> Option<u64> {
        if self.at == u64::MAX {
            return None;
        }
        match self.ahead(counter) {
            Some(ahead) if ahead != 0 => Some(ahead),
            // A narrow comparator matches each time that the low half of the counter comes round.
            _ if self.is(T_32BIT) => {
                let again = (self.at as u32).wrapping_sub(counter as u32);
                Some(if again == 0 { 1 << 32 } else { u64::from(again) })
            }
            _ => None,
        }
    }
}

/// Everything that the device remembers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Regs {
    pub(super) config: u64,
    pub(super) status: u64,
    /// Counter while stopped; counter minus guest time in ticks while running.
    pub(super) counter: u64,
    pub(super) timers: [Comparator; TIMERS],
    wires: [Wire; OUTPUTS],
}

/// Counter periods per second.
pub(super) const HZ: u64 = 1_000_000_000 / PERIOD_NS;

impl Regs {
    /// The registers after reset, with ticks treated as `ticks` says.
    pub(super) fn new(ticks: TickConfig) -> Regs {
        let timer = Comparator {
            config: u64::from(GSI_HPET[0].0) << T_ROUTE_SHIFT,
            at: u64::MAX,
            period: 0,
            armed: false,
            tick: Tick::new(ticks),
            handed: false,
        };
        Regs { config: 0, status: 0, counter: 0, timers: [timer; TIMERS], wires: [Wire::default(); OUTPUTS] }
    }
}

impl Regs {
    pub(super) fn running(&self) -> bool {
        self.config & ENABLE != 0
    }

    pub(super) fn legacy(&self) -> bool {
        self.config & LEGACY != 0
    }

    pub(super) fn counter(&self, now: Nanos) -> u64 {
        if self.running() { self.counter.wrapping_add(now.0 / PERIOD_NS) } else { self.counter }
    }

    /// The line of timer `index`.
    fn output(&self, index: usize) -> Option<usize> {
        if self.legacy() && index < 2 {
            return Some(index);
        }
        let route = (self.timers[index].config & T_ROUTE) >> T_ROUTE_SHIFT;
        GSI_HPET.iter().position(|gsi| u64::from(gsi.0) == route).map(|at| at + 2)
    }

    /// The input that timer `index` sends edges to; `None` if it has no route.
    pub(super) fn edge_input(&self, index: usize) -> Option<Gsi> {
        let [a, b, c, d] = GSI_HPET;
        self.output(index).map(|output| [GSI_TIMER, GSI_RTC, a, b, c, d][output])
    }

    pub(super) fn is_level(&self, index: usize) -> bool {
        self.timers[index].is(T_LEVEL)
    }

    /// Whether a match of timer `index` interrupts.
    fn interrupts(&self, index: usize) -> bool {
        self.timers[index].is(T_INTERRUPT)
    }

    /// Level that the level-triggered timers put on `output`.
    fn level_of(&self, output: usize) -> bool {
        self.running()
            && (0..TIMERS).any(|index| {
                let timer = self.timers[index];
                self.status & 1 << index != 0
                    && timer.is(T_LEVEL)
                    && timer.is(T_INTERRUPT)
                    && self.output(index) == Some(output)
            })
    }

    /// Brings comparators and ticks that interrupt nobody up to `now` (guest time; `line` is the time line).
    pub(super) fn advance(&mut self, now: Nanos, line: Nanos) {
        if !self.running() {
            return;
        }
        let counter = self.counter(now);
        for index in 0..TIMERS {
            if !self.interrupts(index) && self.timers[index].tick.skip(line) {
                self.timers[index].armed = false;
                if self.is_level(index) {
                    self.status |= 1 << index;
                }
                self.rearm_single(index, now, line);
            }
            self.timers[index].move_on(counter);
        }
    }

    /// The tick of timer `index`, through `change`.
    pub(super) fn with_tick<R>(
        &mut self,
        index: usize,
        now: Nanos,
        line: Nanos,
        change: impl FnOnce(&mut Tick) -> R,
    ) -> R {
        let result = change(&mut self.timers[index].tick);
        if self.timers[index].tick.is_raised() {
            self.timers[index].armed = false;
        }
        self.rearm_single(index, now, line);
        result
    }

    /// A timer that does not repeat may match again when its counter has wrapped.
    fn rearm_single(&mut self, index: usize, now: Nanos, line: Nanos) {
        let counter = self.counter(now);
        let running = self.running();
        let timer = &mut self.timers[index];
        if running
            && timer.repeats().is_none()
            && !timer.tick.is_running()
            && !timer.armed
            && let Some(ahead) = timer.next(counter)
        {
            timer.tick.start_once(line.saturating_add(Nanos(ahead.saturating_mul(PERIOD_NS))));
        }
    }

    /// A due tick of a level-triggered timer shows in the status register, whose bit the guest clears.
    /// Says what guest clocks are to show then ([`Tick::apparent`]).
    pub(super) fn offer_level(&mut self, index: usize, now: Moment, slept: bool) -> Option<(Nanos, bool)> {
        let timer = &mut self.timers[index];
        if !timer.is(T_INTERRUPT) || !timer.tick.offer(now, slept) {
            return None;
        }
        timer.armed = false;
        self.status |= 1 << index;
        timer.tick.apparent()
    }

    /// Since when the ticks are due that are not handed over yet: those are handed over now.
    pub(super) fn hand_over(&mut self, line: Nanos) -> [Option<Nanos>; TIMERS] {
        let interrupts: [bool; TIMERS] = std::array::from_fn(|index| self.interrupts(index));
        std::array::from_fn(|index| {
            let timer = &mut self.timers[index];
            let due = interrupts[index] && !timer.handed && timer.tick.is_due(line);
            timer.handed |= due;
            due.then(|| timer.tick.next().unwrap_or(line))
        })
    }

    /// The tick of timer `index` is being offered.
    pub(super) fn take_over(&mut self, index: usize) {
        self.timers[index].handed = false;
    }

    /// Aims the tick of timer `index` at its comparator. One that was set and has been reached is due now.
    fn arm(&mut self, index: usize, now: Nanos, line: Nanos) {
        self.timers[index].tick.stop();
        if !self.running() {
            return;
        }
        let counter = self.counter(now);
        let timer = &mut self.timers[index];
        let reached = timer.ahead(counter).is_none_or(|ahead| ahead == 0);
        let due = reached && timer.armed;
        timer.move_on(counter);
        let Some(every) = timer.repeats() else {
            if due {
                timer.tick.start_once(line);
            } else {
                if reached {
                    timer.armed = false;
                }
                if let Some(ahead) = timer.next(counter) {
                    timer.tick.start_once(line.saturating_add(Nanos(ahead.saturating_mul(PERIOD_NS))));
                }
            }
            return;
        };
        if let Some(ahead) = timer.next(counter) {
            // The counter steps at multiples of its period of guest time.
            let lag = line.saturating_sub(now).0 / PERIOD_NS;
            let first = (now.0 / PERIOD_NS).saturating_add(ahead).saturating_add(lag);
            let grid = Grid { hz: HZ, first, every };
            if due { timer.tick.start_late(grid) } else { timer.tick.start_periodic(grid) }
        }
    }

    /// The earliest tick on the time line that can interrupt.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        (0..TIMERS)
            .filter(|index| self.interrupts(*index) && !self.timers[*index].handed)
            .filter_map(|index| self.timers[index].tick.deadline())
            .min()
    }

    /// Brings the lines up to date.
    pub(super) fn settle(&mut self) -> [Wire; OUTPUTS] {
        for output in 0..OUTPUTS {
            let level = self.level_of(output);
            self.wires[output].set(level);
        }
        self.wires
    }

    /// Reads the 8-byte register at `offset`.
    pub(super) fn read(&self, offset: u64) -> u64 {
        let timer = (offset.wrapping_sub(0x100) / 0x20) as usize;
        match offset {
            CAPABILITY => u64::from(CAPABILITIES) | (PERIOD_NS * 1_000_000) << 32,
            CONFIGURATION => self.config,
            STATUS => self.status,
            0x100.. if timer < TIMERS => {
                let timer = self.timers[timer];
                match offset & 0x1f {
                    0x00 => timer.config | T_PERIODIC_CAP | T_64BIT_CAP | routes() << 32,
                    0x08 => timer.at & timer.width_mask(),
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Writes those bits of the 8-byte register at `offset` that `mask` selects.
    pub(super) fn write(&mut self, offset: u64, value: u64, mask: u64, now: Nanos, line: Nanos) {
        let merge = |old: u64| old & !mask | value & mask;
        let timer = (offset.wrapping_sub(0x100) / 0x20) as usize;
        match offset {
            CONFIGURATION => self.configure(merge(self.config) & (ENABLE | LEGACY), now, line),
            STATUS => self.acknowledge(value & mask, now, line),
            // To be written only while the counter stands (specification, 2.3.7).
            COUNTER if !self.running() => {
                let old = self.counter;
                self.counter = merge(old);
                for timer in &mut self.timers {
                    // In 32-bit mode the comparator is relative to the counter's upper half.
                    if timer.is(T_32BIT) && timer.at != u64::MAX {
                        let armed = timer.armed;
                        timer.set(timer.at, self.counter);
                        timer.armed = armed;
                    }
                }
            }
            0x100.. if timer < TIMERS => match offset & 0x1f {
                0x00 => self.configure_timer(timer, merge(self.timers[timer].config), now, line),
                0x08 => self.compare(timer, value, mask, now, line),
                _ => {}
            },
            _ => {}
        }
    }

    /// The guest clears status bits: it has taken those interrupts.
    fn acknowledge(&mut self, bits: u64, now: Nanos, line: Nanos) {
        let cleared = self.status & bits;
        self.status &= !bits;
        for index in (0..TIMERS).filter(|index| cleared & 1 << index != 0) {
            if self.is_level(index) {
                self.with_tick(index, now, line, |tick| tick.taken(line));
            }
        }
    }

    fn configure(&mut self, config: u64, now: Nanos, line: Nanos) {
        let was_running = self.running();
        let counter = self.counter(now);
        self.config = config;
        if was_running == self.running() {
            return;
        }
        let ticks = now.0 / PERIOD_NS;
        self.counter = if self.running() { counter.wrapping_sub(ticks) } else { counter };
        for index in 0..TIMERS {
            self.arm(index, now, line);
        }
    }

    fn configure_timer(&mut self, index: usize, config: u64, now: Nanos, line: Nanos) {
        let counter = self.counter(now);
        let timer = &mut self.timers[index];
        let old = timer.config;
        let mut config = config & T_WRITABLE;
        let route = (config & T_ROUTE) >> T_ROUTE_SHIFT;
        if routes() & 1 << route == 0 {
            config = config & !T_ROUTE | old & T_ROUTE;
        }
        if config & T_PERIODIC == 0 {
            config &= !T_SET_VALUE;
        }
        timer.config = config;
        if (old ^ config) & (T_PERIODIC | T_32BIT) != 0 {
            let armed = timer.armed;
            if old & !config & T_32BIT != 0 && timer.at != u64::MAX {
                timer.at &= 0xffff_ffff;
            } else if config & !old & T_32BIT != 0 && timer.at != u64::MAX {
                timer.set(timer.at, counter);
            }
            timer.armed = armed;
            self.arm(index, now, line);
        } else if (old ^ config) & (T_INTERRUPT | T_LEVEL) != 0 {
            self.arm(index, now, line);
        }
        // The status bit belongs to level-triggered mode.
        if config & T_LEVEL == 0 {
            self.status &= !(1 << index);
        }
    }

    /// A write to the comparator register sets the comparator or the period, never both.
    fn compare(&mut self, index: usize, value: u64, mask: u64, now: Nanos, line: Nanos) {
        let counter = self.counter(now);
        let timer = &mut self.timers[index];
        let mask = mask & timer.width_mask();
        if mask == 0 {
            return;
        }
        if timer.is(T_PERIODIC) && !timer.is(T_SET_VALUE) {
            timer.period = timer.period & !mask | value & mask;
        } else {
            let merged = timer.at & !mask | value & mask;
            timer.set(merged & timer.width_mask(), counter);
        }
        timer.config &= !T_SET_VALUE;
        self.arm(index, now, line);
    }

    pub(super) fn inspect(&self, now: Nanos) -> Vec<(String, String)> {
        let mut tree = vec![
            ("config".to_owned(), format!("{:#x}", self.config)),
            ("status".to_owned(), format!("{:#x}", self.status)),
            ("counter".to_owned(), self.counter(now).to_string()),
        ];
        for (index, timer) in self.timers.iter().enumerate() {
            tree.push((
                format!("timer{index}/config"),
                format!("{:#x}", self.read(0x100 + 0x20 * index as u64)),
            ));
            tree.push((format!("timer{index}/comparator"), timer.at.to_string()));
            tree.push((format!("timer{index}/period"), timer.period.to_string()));
            tree.extend(tick_values(&format!("timer{index}"), &timer.tick));
        }
        tree
    }
}
