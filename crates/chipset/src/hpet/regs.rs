//! The registers and the state machine behind them; pure, with "now" as an argument.

use serde::{Deserialize, Serialize};
use wardian_time::{Nanos, Tick};

use super::{CAPABILITIES, MIN_PERIOD_TICKS, PERIOD_NS};
use crate::layout::GSI_HPET;
use crate::wire::Wire;

/// Offset of the main counter.
pub(super) const COUNTER: u64 = 0xf0;
const CAPABILITY: u64 = 0x00;
const CONFIGURATION: u64 = 0x10;
const STATUS: u64 = 0x20;
const TIMERS: usize = 3;
/// Lines: system timer, RTC and the four of [`GSI_HPET`].
pub(super) const OUTPUTS: usize = 6;

const ENABLE: u64 = 1 << 0;
const LEGACY: u64 = 1 << 1;

const T_LEVEL: u64 = 1 << 1;
const T_INTERRUPT: u64 = 1 << 2;
const T_PERIODIC: u64 = 1 << 3;
const T_PERIODIC_CAP: u64 = 1 << 4;
const T_64BIT_CAP: u64 = 1 << 5;
const T_SET_VALUE: u64 = 1 << 6;
const T_32BIT: u64 = 1 << 8;
const T_ROUTE_SHIFT: u32 = 9;
const T_ROUTE: u64 = 0x1f << T_ROUTE_SHIFT;
const T_WRITABLE: u64 = T_LEVEL | T_INTERRUPT | T_PERIODIC | T_SET_VALUE | T_32BIT | T_ROUTE;

/// A 32-bit comparator this much behind the counter was meant to be in the past: 1/1024 s. Any further
/// behind, it is meant to come after the counter has wrapped.
const TINY_SPAN: u64 = 1_000_000_000 / PERIOD_NS / 1024;

fn routes() -> u64 {
    GSI_HPET.iter().fold(0, |mask, gsi| mask | 1 << gsi.0)
}

#[derive(Clone, Copy, Debug)]
struct Comparator {
    config: u64,
    /// The comparator in the 64 bits of the counter, also in 32-bit mode.
    at: u64,
    /// Ticks between interrupts in periodic mode as the guest set it; 0 until it has.
    period: u64,
    /// The counter has not reached `at` since that was set.
    armed: bool,
    tick: Tick,
}

impl Comparator {
    fn is(self, bit: u64) -> bool {
        self.config & bit != 0
    }

    /// Ticks between interrupts, if they repeat: not less than 100 us, not more than half the counter's range.
    fn repeats(self) -> Option<u64> {
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
    config: u64,
    status: u64,
    /// Counter while stopped; counter minus guest time in ticks while running.
    counter: u64,
    timers: [Comparator; TIMERS],
    wires: [Wire; OUTPUTS],
}

impl Default for Regs {
    fn default() -> Regs {
        let timer = Comparator {
            config: u64::from(GSI_HPET[0].0) << T_ROUTE_SHIFT,
            at: u64::MAX,
            period: 0,
            armed: false,
            tick: Tick::stopped(),
        };
        Regs { config: 0, status: 0, counter: 0, timers: [timer; TIMERS], wires: [Wire::default(); OUTPUTS] }
    }
}

impl Regs {
    fn running(&self) -> bool {
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

    fn fire(&mut self, index: usize) {
        let timer = self.timers[index];
        if timer.is(T_LEVEL) {
            self.status |= 1 << index;
        } else if timer.is(T_INTERRUPT)
            && let Some(output) = self.output(index)
        {
            self.wires[output].pulse();
        }
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

    /// Delivers what was due up to `now`.
    pub(super) fn advance(&mut self, now: Nanos) {
        if !self.running() {
            return;
        }
        let counter = self.counter(now);
        for index in 0..TIMERS {
            if !self.timers[index].tick.take_due(now) {
                continue;
            }
            self.fire(index);
            self.timers[index].armed = false;
            if self.timers[index].repeats().is_some() {
                self.timers[index].move_on(counter);
            } else {
                self.arm(index, now);
            }
        }
    }

    /// Aims the tick of timer `index` at its comparator. One that was set and has been reached fires now.
    fn arm(&mut self, index: usize, now: Nanos) {
        self.timers[index].tick.stop();
        if !self.running() {
            return;
        }
        let counter = self.counter(now);
        let reached = self.timers[index].ahead(counter).is_none_or(|ahead| ahead == 0);
        if reached && std::mem::take(&mut self.timers[index].armed) {
            self.fire(index);
        }
        let timer = &mut self.timers[index];
        timer.move_on(counter);
        if let Some(ahead) = timer.next(counter) {
            let at = Nanos((now.0 / PERIOD_NS).saturating_add(ahead).saturating_mul(PERIOD_NS));
            match timer.repeats() {
                Some(period) => timer.tick.start_periodic(at, Nanos(period.saturating_mul(PERIOD_NS))),
                None => timer.tick.start_once(at),
            }
        }
    }

    /// The earliest tick that can interrupt. A level that is up already needs no other.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        (0..TIMERS)
            .filter(|index| {
                let timer = self.timers[*index];
                timer.is(T_INTERRUPT) && !(timer.is(T_LEVEL) && self.status & 1 << index != 0)
            })
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
    pub(super) fn write(&mut self, offset: u64, value: u64, mask: u64, now: Nanos) {
        let merge = |old: u64| old & !mask | value & mask;
        let timer = (offset.wrapping_sub(0x100) / 0x20) as usize;
        match offset {
            CONFIGURATION => self.configure(merge(self.config) & (ENABLE | LEGACY), now),
            STATUS => self.status &= !(value & mask),
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
                0x00 => self.configure_timer(timer, merge(self.timers[timer].config), now),
                0x08 => self.compare(timer, value, mask, now),
                _ => {}
            },
            _ => {}
        }
    }

    fn configure(&mut self, config: u64, now: Nanos) {
        let was_running = self.running();
        let counter = self.counter(now);
        self.config = config;
        if was_running == self.running() {
            return;
        }
        let ticks = now.0 / PERIOD_NS;
        self.counter = if self.running() { counter.wrapping_sub(ticks) } else { counter };
        for index in 0..TIMERS {
            self.arm(index, now);
        }
    }

    fn configure_timer(&mut self, index: usize, config: u64, now: Nanos) {
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
            self.arm(index, now);
        }
        // The status bit belongs to level-triggered mode.
        if config & T_LEVEL == 0 {
            self.status &= !(1 << index);
        }
    }

    /// A write to the comparator register sets the comparator or the period, never both.
    fn compare(&mut self, index: usize, value: u64, mask: u64, now: Nanos) {
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
        self.arm(index, now);
    }

    pub(super) fn inspect(&self, now: Nanos) -> Vec<(String, String)> {
        let mut tree = vec![
            ("config".to_owned(), format!("{:#x}", self.config)),
            ("status".to_owned(), format!("{:#x}", self.status)),
            ("counter".to_owned(), self.counter(now).to_string()),
        ];
        for (index, timer) in self.timers.iter().enumerate() {
            let (delivered, missed) = timer.tick.counts();
            tree.push((
                format!("timer{index}/config"),
                format!("{:#x}", self.read(0x100 + 0x20 * index as u64)),
            ));
            tree.push((format!("timer{index}/comparator"), timer.at.to_string()));
            tree.push((format!("timer{index}/period"), timer.period.to_string()));
            tree.push((format!("timer{index}/delivered"), delivered.to_string()));
            tree.push((format!("timer{index}/missed"), missed.to_string()));
        }
        tree
    }
}

/// One timer as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HpetTimerState {
    /// Configuration register without the capability bits.
    pub config: u64,
    /// Comparator in the 64 bits of the counter.
    pub comparator: u64,
    /// Period in ticks; 0 if none was set.
    pub period: u64,
    /// The comparator was set and has not matched yet.
    pub armed: bool,
}

/// The HPET as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HpetState {
    /// General configuration register.
    pub config: u64,
    /// General interrupt status register.
    pub status: u64,
    /// The counter, running or not.
    pub counter: u64,
    /// The timers.
    pub timers: [HpetTimerState; TIMERS],
}

impl Regs {
    /// Call after [`Regs::advance`] for the same `now`.
    pub(super) fn save(&self, now: Nanos) -> HpetState {
        HpetState {
            config: self.config,
            status: self.status,
            counter: self.counter(now),
            timers: self.timers.map(|timer| HpetTimerState {
                config: timer.config,
                comparator: timer.at,
                period: timer.period,
                armed: timer.armed,
            }),
        }
    }

    pub(super) fn restore(state: &HpetState, now: Nanos) -> Regs {
        let mut regs = Regs::default();
        for (timer, saved) in regs.timers.iter_mut().zip(&state.timers) {
            let route = (saved.config & T_ROUTE) >> T_ROUTE_SHIFT;
            timer.config = saved.config & T_WRITABLE;
            if routes() & 1 << route == 0 {
                timer.config = timer.config & !T_ROUTE | u64::from(GSI_HPET[0].0) << T_ROUTE_SHIFT;
            }
            timer.at = saved.comparator;
            timer.period = saved.period;
            timer.armed = saved.armed;
        }
        regs.status = state.status & ((1 << TIMERS) - 1);
        regs.counter = state.counter;
        regs.configure(state.config & (ENABLE | LEGACY), now);
        regs
    }
}
