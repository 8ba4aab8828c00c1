//! The CMOS clock: an MC146818 with 128 bytes of memory (Motorola MC146818A data sheet, 1984), and the
//! century in register 32h as the FADT says.
//!
//! Its time is UTC: [`TimeBase::wall`] plus what the guest has set it off by. All of it is computed when a
//! register is read; a host timer runs only while an enabled interrupt is due. A periodic interrupt counts
//! as taken when the guest reads register C.

mod calendar;
mod persist;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, OnceLock};

use calendar::{DateTime, Format};
use wardian_bus::{Access, Device};
use wardian_irq::{Line, TickPort, TickSource};
use wardian_time::{Grid, Moment, Nanos, Tick, TickConfig, TimeBase, Timer, TimerHandler, TimerQueue};

use crate::edge_ticks::tick_values;
use crate::hpet::LegacyRouting;
use crate::wire::{Output, Wire, lock};

pub use persist::RtcState;

/// Register of the century, BCD or binary as register B says.
pub const CENTURY: u8 = 0x32;

const SECONDS: usize = 0x00;
const SECONDS_ALARM: usize = 0x01;
const MINUTES: usize = 0x02;
const MINUTES_ALARM: usize = 0x03;
const HOURS: usize = 0x04;
const HOURS_ALARM: usize = 0x05;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const A: usize = 0x0a;
const B: usize = 0x0b;
const C: usize = 0x0c;
const D: usize = 0x0d;

/// A: update in progress.
const A_UIP: u8 = 1 << 7;
/// B: hold the registers, the guest sets them.
const B_SET: u8 = 1 << 7;
/// B: update-ended interrupt enable.
const B_UIE: u8 = 1 << 4;
/// B: registers are binary, not BCD.
const B_BINARY: u8 = 1 << 2;
/// B: hours count to 24.
const B_24H: u8 = 1 << 1;
/// C: some enabled interrupt waits.
const C_IRQF: u8 = 1 << 7;
/// C flags, at the same bits as their enables in B: periodic, alarm, update ended.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATE: u8 = 1 << 4;
/// D: memory and time are valid.
const D_VALID: u8 = 1 << 7;

/// The quartz in Hz.
const QUARTZ: u64 = 32_768;
/// UIP shows this long before the registers change (data sheet: 244 us).
const UPDATE_WARNING: i128 = 244_141;
const SECOND: i128 = 1_000_000_000;
/// After the divider was held in reset, the first update comes half a second after its release.
const RELEASE_PHASE: i128 = SECOND / 2;

/// What the memory-size bytes of the CMOS tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemorySize {
    /// Bytes of RAM below 4 GiB.
    pub low: u64,
    /// Bytes of RAM above 4 GiB.
    pub high: u64,
}

#[derive(Clone, Debug)]
struct State {
    index: u8,
    nmi_masked: bool,
    /// Memory; the time registers in it count only while the clock is held.
    cmos: [u8; 128],
    /// PF, AF and UF of register C.
    flags: u8,
    /// Clock minus wall clock, in ns.
    offset: i128,
    /// The divider was in reset while the clock was held.
    divider_was_reset: bool,
    /// Second up to which updates and alarms are accounted.
    seen: i128,
    /// Periodic interrupt, while that is enabled; otherwise only its flag.
    tick: Tick,
    /// The tick is due and vCPU 0 was asked to let it be offered.
    handed: bool,
    wire: Wire,
}

impl State {
    fn new(wall: Nanos, line: Nanos, memory: MemorySize, ticks: TickConfig) -> State {
        let mut cmos = [0; 128];
        cmos[A] = 0x26;
        cmos[B] = B_24H;
        let mut put = |at: usize, value: u64, limit: u64| {
            let value = value.min(limit);
            cmos[at] = value as u8;
            cmos[at + 1] = (value >> 8) as u8;
        };
        let kib = memory.low >> 10;
        put(0x15, 640, 640);
        put(0x17, kib.saturating_sub(1024), 0xfc00);
        put(0x30, kib.saturating_sub(1024), 0xfc00);
        put(0x34, kib.saturating_sub(16 << 10) >> 6, 0xffff);
        let high = (memory.high >> 16).min(0xff_ffff);
        put(0x5b, high & 0xffff, 0xffff);
        cmos[0x5d] = (high >> 16) as u8;
        cmos[0x14] = 0x02; // equipment: a coprocessor
        let mut state = State {
            index: 0,
            nmi_masked: false,
            cmos,
            flags: 0,
            offset: 0,
            divider_was_reset: false,
            seen: i128::from(wall.0) / SECOND,
            tick: Tick::new(ticks),
            handed: false,
            wire: Wire::default(),
        };
        state.arm_periodic(line);
        state
    }

    fn format(&self) -> Format {
        Format { binary: self.cmos[B] & B_BINARY != 0, hours24: self.cmos[B] & B_24H != 0 }
    }

    fn divider_in_reset(&self) -> bool {
        self.cmos[A] & 0x60 == 0x60
    }

    fn held(&self) -> bool {
        self.cmos[B] & B_SET != 0 || self.divider_in_reset()
    }

    /// The clock in ns since the epoch, which may lie before it.
    fn clock(&self, wall: Nanos) -> i128 {
        i128::from(wall.0) + self.offset
    }

    /// Quartz periods between periodic interrupts, if there are any.
    fn rate(&self) -> Option<u64> {
        let code = match self.cmos[A] & 0x0f {
            0 => return None,
            code @ (1 | 2) => code + 7,
            code => code,
        };
        (!self.divider_in_reset()).then(|| 1 << (code - 1))
    }

    /// Starts the periodic interrupt after `line`, in phase with the quartz.
    fn arm_periodic(&mut self, line: Nanos) {
        match self.rate() {
            Some(every) => {
                let first = (line.to_ticks(QUARTZ) / every + 1) * every;
                self.tick.start_periodic(Grid { hz: QUARTZ, first, every });
            }
            None => self.tick.stop(),
        }
    }

    fn periodic_enabled(&self) -> bool {
        self.cmos[B] & PERIODIC != 0
    }

    /// A due tick becomes an interrupt; says what guest clocks are to show ([`Tick::apparent`]).
    fn offer(&mut self, now: Moment, slept: bool) -> Option<(Nanos, bool)> {
        self.handed = false;
        if !self.periodic_enabled() || !self.tick.offer(now, slept) {
            return None;
        }
        self.flags |= PERIODIC;
        self.tick.apparent()
    }

    /// Accounts for everything that was due up to now, interrupts that count ticks excepted.
    fn advance(&mut self, line: Nanos, wall: Nanos) {
        if !self.periodic_enabled() && self.tick.skip(line) {
            self.flags |= PERIODIC;
        }
        let second = self.clock(wall).div_euclid(SECOND);
        if !self.held() && second > self.seen {
            self.flags |= UPDATE;
            if self.next_alarm(self.seen).is_some_and(|alarm| alarm <= second) {
                self.flags |= ALARM;
            }
        }
        self.seen = second;
    }

    /// The first second after `after` at which the alarm registers match.
    fn next_alarm(&self, after: i128) -> Option<i128> {
        let format = self.format();
        let field = |register: usize, limit: i128, decode: fn(Format, u8) -> u8| {
            let raw = self.cmos[register];
            // The two top bits set: any value matches.
            if raw >= 0xc0 {
                return Some(None);
            }
            let value = i128::from(decode(format, raw));
            (value < limit).then_some(Some(value))
        };
        let hour = field(HOURS_ALARM, 24, Format::decode_hour)?;
        let minute = field(MINUTES_ALARM, 60, Format::decode)?;
        let second = field(SECONDS_ALARM, 60, Format::decode)?;
        let matches = |wanted: Option<i128>, is: i128| wanted.is_none_or(|wanted| wanted == is);
        let mut at = after + 1;
        while at <= after + 86_400 {
            let of_day = at.rem_euclid(86_400);
            if !matches(hour, of_day / 3600) {
                at += 3600 - of_day % 3600;
            } else if !matches(minute, of_day / 60 % 60) {
                at += 60 - of_day % 60;
            } else if !matches(second, of_day % 60) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    fn interrupting(&self) -> bool {
        self.flags & self.cmos[B] & (PERIODIC | ALARM | UPDATE) != 0
    }

    /// When on the time line an enabled interrupt is due. While one waits already, nothing more can happen
    /// to the line.
    fn deadline(&self, line: Nanos, wall: Nanos) -> Option<Nanos> {
        if self.interrupting() {
            return None;
        }
        let enabled = self.cmos[B];
        let periodic = if self.periodic_enabled() && !self.handed { self.tick.deadline() } else { None };
        let second = if self.held() {
            None
        } else if enabled & UPDATE != 0 {
            Some(self.seen + 1)
        } else if enabled & ALARM != 0 {
            self.next_alarm(self.seen)
        } else {
            None
        };
        let second = second.map(|second| {
            let wait = second * SECOND - self.clock(wall);
            line.saturating_add(Nanos(u64::try_from(wait).unwrap_or(0)))
        });
        periodic.into_iter().chain(second).min()
    }

    fn time_register(&self, register: usize, time: DateTime) -> u8 {
        let format = self.format();
        match register {
            SECONDS => format.encode(time.second),
            MINUTES => format.encode(time.minute),
            HOURS => format.encode_hour(time.hour),
            WEEKDAY => format.encode(time.weekday),
            DAY => format.encode(time.day),
            MONTH => format.encode(time.month),
            YEAR => format.encode((time.year % 100) as u8),
            _ => format.encode((time.year / 100 % 100) as u8),
        }
    }

    /// Puts the clock into its registers, where the guest may change it.
    fn store(&mut self, wall: Nanos) {
        let time = DateTime::from_seconds(self.clock(wall).div_euclid(SECOND));
        for register in TIME_REGISTERS {
            self.cmos[register] = self.time_register(register, time);
        }
    }

    /// Sets the clock from its registers, `phase` ns after the second began.
    fn load(&mut self, wall: Nanos, phase: i128) {
        let format = self.format();
        let field = |register: usize| format.decode(self.cmos[register]);
        let time = DateTime {
            year: u32::from(field(usize::from(CENTURY))) * 100 + u32::from(field(YEAR)),
            month: field(MONTH),
            day: field(DAY),
            weekday: 1,
            hour: format.decode_hour(self.cmos[HOURS]),
            minute: field(MINUTES),
            second: field(SECONDS),
        };
        let seconds = time.to_seconds();
        self.offset = seconds * SECOND + phase - i128::from(wall.0);
        self.seen = seconds;
    }

    /// Writes a control register that may hold or release the clock.
    fn control(&mut self, register: usize, value: u8, line: Nanos, wall: Nanos) {
        let held = self.held();
        if !held && (register == A && value & 0x60 == 0x60 || register == B && value & B_SET != 0) {
            self.store(wall);
            self.divider_was_reset = false;
        }
        self.cmos[register] = value;
        self.divider_was_reset |= self.divider_in_reset();
        if held && !self.held() {
            let phase =
                if self.divider_was_reset { RELEASE_PHASE } else { self.clock(wall).rem_euclid(SECOND) };
            self.load(wall, phase);
        }
        if register == A {
            self.arm_periodic(line);
        }
        if register == B && !self.periodic_enabled() {
            // Interrupts that wait are nobody's any more; the grid stays.
            self.arm_periodic(line);
        }
    }

    fn read(&mut self, port: u64, now: Moment, wall: Nanos) -> u8 {
        if port != 1 {
            return 0xff; // the index port is write-only
        }
        let register = usize::from(self.index);
        match register {
            A => {
                let phase = self.clock(wall).rem_euclid(SECOND);
                let uip = !self.held() && phase >= SECOND - UPDATE_WARNING;
                self.cmos[A] | if uip { A_UIP } else { 0 }
            }
            C => {
                let irqf = if self.interrupting() { C_IRQF } else { 0 };
                let flags = std::mem::take(&mut self.flags) | irqf;
                if flags & PERIODIC != 0 {
                    self.tick.taken(now);
                }
                flags
            }
            D => D_VALID,
            _ if TIME_REGISTERS.contains(&register) && !self.held() => {
                let time = DateTime::from_seconds(self.clock(wall).div_euclid(SECOND));
                self.time_register(register, time)
            }
            _ => self.cmos[register],
        }
    }

    fn write(&mut self, port: u64, value: u8, line: Nanos, wall: Nanos) {
        if port == 0 {
            self.index = value & 0x7f;
            self.nmi_masked = value & 0x80 != 0;
            return;
        }
        let register = usize::from(self.index);
        match register {
            A => self.control(A, value & !A_UIP, line, wall),
            B if value & B_SET != 0 => self.control(B, value & !B_UIE, line, wall),
            B => self.control(B, value, line, wall),
            C | D => {}
            _ if TIME_REGISTERS.contains(&register) && !self.held() => {
                let phase = self.clock(wall).rem_euclid(SECOND);
                self.store(wall);
                self.cmos[register] = value;
                self.load(wall, phase);
            }
            _ => self.cmos[register] = value,
        }
    }
}

const TIME_REGISTERS: [usize; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY as usize];

/// The clock, at ports 70h (index, NMI mask) and 71h (data). Its lock is above the timer queue's only.
pub struct Rtc {
    state: Mutex<State>,
    base: Arc<TimeBase>,
    timer: OnceLock<Timer>,
    ticks: OnceLock<TickPort>,
    line: Output,
    routing: LegacyRouting,
}

impl Rtc {
    /// A clock on `queue`'s time whose interrupt is `line`, unless `routing` gives that to the HPET, and
    /// whose periodic interrupt is treated as `ticks` says.
    #[must_use]
    pub fn new(
        queue: &Arc<TimerQueue>,
        line: Line,
        memory: MemorySize,
        routing: LegacyRouting,
        ticks: TickConfig,
    ) -> Arc<Rtc> {
        let base = queue.base();
        let state = State::new(base.wall(), base.timeline(), memory, ticks);
        Self::build(queue, line, routing, state)
    }

    fn build(queue: &Arc<TimerQueue>, line: Line, routing: LegacyRouting, state: State) -> Arc<Rtc> {
        let base = Arc::clone(queue.base());
        let chip = Arc::clone(line.chip());
        let rtc = Arc::new(Rtc {
            state: Mutex::new(state),
            base,
            timer: OnceLock::new(),
            ticks: OnceLock::new(),
            line: Output::new(line),
            routing,
        });
        let handler: std::sync::Weak<Rtc> = Arc::downgrade(&rtc);
        let _ = rtc.timer.set(queue.timer(handler.clone()));
        let _ = rtc.ticks.set(TickPort::new(chip, handler));
        rtc
    }

    /// Whether the guest masks NMIs by bit 7 of port 70h.
    #[must_use]
    pub fn nmi_masked(&self) -> bool {
        lock(&self.state).nmi_masked
    }

    /// Lets `change` at the state, at a point of the time line and the wall clock.
    fn change<R>(&self, change: impl FnOnce(&mut State, Nanos, Nanos) -> R) -> R {
        let line = self.base.timeline();
        let wall = self.base.wall();
        let (result, wire) = {
            let mut state = lock(&self.state);
            state.advance(line, wall);
            let result = change(&mut state, line, wall);
            let level = state.interrupting() && !self.routing.is_on();
            state.wire.set(level);
            if let Some(timer) = self.timer.get() {
                timer.set_line(state.deadline(line, wall));
            }
            (result, state.wire)
        };
        self.line.publish(wire);
        result
    }

    fn offer_tick(&self, slept: bool) {
        // What guest clocks show changes before the interrupt does.
        let now = self.base.moment();
        let apparent = lock(&self.state).offer(now, slept);
        if let Some((at, back)) = apparent {
            self.base.show(at, back);
        }
        self.change(|_, _, _| ());
    }
}

impl TimerHandler for Rtc {
    fn expired(&self, _now: Nanos) {
        let due = self.change(|state, line, _| {
            let due = state.periodic_enabled() && !state.handed && state.tick.is_due(line);
            state.handed |= due;
            due.then(|| state.tick.next().unwrap_or(line))
        });
        if let Some((point, ticks)) = due.zip(self.ticks.get()) {
            ticks.due(point);
        }
    }
}

impl TickSource for Rtc {
    fn offer(&self, slept: bool) {
        self.offer_tick(slept);
    }

    // The line is a level: register C tells.
    fn taken(&self) {}
    fn retry(&self) {}
}

impl Device for Rtc {
    fn name(&self) -> &str {
        "rtc"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        let now = self.base.moment();
        let again = self.change(|state, _, wall| {
            for (port, byte) in (at.offset..).zip(data.iter_mut()) {
                *byte = state.read(port, now, wall);
            }
            state.tick.backlog() > 0 && !state.tick.is_raised()
        });
        if again {
            self.offer_tick(false); // the line was seen to fall
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        self.change(|state, line, wall| {
            for (port, byte) in (at.offset..).zip(data).filter(|(port, _)| *port < 2) {
                state.write(port, *byte, line, wall);
            }
        });
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let wall = self.base.wall();
        let state = lock(&self.state);
        let hex = |value: u8| format!("{value:#04x}");
        let mut values = vec![
            ("time".into(), DateTime::from_seconds(state.clock(wall).div_euclid(SECOND)).to_string()),
            ("offset_ns".into(), state.offset.to_string()),
            ("index".into(), hex(state.index)),
            ("nmi_masked".into(), state.nmi_masked.to_string()),
            ("a".into(), hex(state.cmos[A])),
            ("b".into(), hex(state.cmos[B])),
            ("c".into(), hex(state.flags)),
            ("interrupt".into(), state.wire.level().to_string()),
        ];
        values.extend(tick_values("periodic", &state.tick));
        values
    }
}
