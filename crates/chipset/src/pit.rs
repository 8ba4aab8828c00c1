//! The programmable interval timer: an 8254 at 40h-43h, with gate and output of channel 2 at port 61h
//! (Intel 8254 data sheet; 82371AB data sheet, 4.2.3).
//!
//! Counters run at [`PIT_HZ`] of guest time. A count is loaded at the tick of the write, not one later.
//! Each rising edge of channel 0's output is a tick.

mod channel;
mod persist;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use wardian_bus::{Access, Device};
use wardian_irq::{Gsi, Line, TickPort, TickSource};
use wardian_time::{Grid, Nanos, Tick, TickConfig, TimeBase, Timer, TimerHandler, TimerQueue};

use crate::edge_ticks::{EdgeTicks, tick_values};
use channel::Channel;

pub use channel::persist::{ChannelState, CountingState, LatchState, NextCountState, TransferState};
pub use persist::PitState;

/// Input clock in Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// Half a period of the refresh request that bit 4 of port 61h shows.
const REFRESH: u64 = 15_085;

struct PitRegs {
    channels: [Channel; 3],
    /// Rising edges of channel 0's output.
    tick: Tick,
    /// Port 61h as written, bits 3:0.
    control: u8,
}

/// The timer chip. Maps at ports 40h-43h; [`Pit::port61`] goes to 61h.
///
/// Lock order: its state, then the timer queue's. The line is raised without a lock.
pub struct Pit {
    state: Mutex<PitRegs>,
    timer: Timer,
    line: Line,
    ticks: TickPort,
}

impl Pit {
    /// A timer whose channel 0 drives `line`, served by `queue`, with ticks as `ticks` says.
    #[must_use]
    pub fn new(queue: &Arc<TimerQueue>, line: Line, ticks: TickConfig) -> Arc<Pit> {
        let regs = PitRegs {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            tick: Tick::new(ticks),
            control: 0,
        };
        Self::build(queue, line, regs)
    }

    fn build(queue: &Arc<TimerQueue>, line: Line, regs: PitRegs) -> Arc<Pit> {
        Arc::new_cyclic(|this: &Weak<Pit>| Pit {
            state: Mutex::new(regs),
            timer: queue.timer(this.clone() as Weak<dyn TimerHandler>),
            ticks: line.ticks(this.clone() as Weak<dyn TickSource>),
            line,
        })
    }

    /// System control port B, to be mapped at 61h.
    #[must_use]
    pub fn port61(self: &Arc<Self>) -> Arc<dyn Device> {
        Arc::new(Port61(Arc::clone(self)))
    }

    fn lock(&self) -> MutexGuard<'_, PitRegs> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ticks(&self) -> u64 {
        self.timer.base().read().to_ticks(PIT_HZ)
    }

    /// Lets the tick follow the rising edges of channel 0's output after `now`.
    fn restart(&self, state: &mut PitRegs, now: u64) {
        let lag = self.timer.base().lag();
        match state.channels[0].rises(now) {
            // What guest clocks lag behind, the grid does as well.
            Some((first, Some(every))) => {
                state.tick.start_periodic(Grid { hz: PIT_HZ, first: first + lag.to_ticks(PIT_HZ), every });
            }
            Some((at, None)) => state.tick.start_once(Nanos::from_ticks(at, PIT_HZ).saturating_add(lag)),
            None => state.tick.stop(),
        }
        self.timer.set_line(state.tick.deadline());
    }

    fn write_port(&self, port: u64, value: u8) {
        let mut state = self.lock();
        let now = self.ticks();
        match port {
            0..=2 => {
                state.channels[port as usize].write(value, now);
                if port == 0 {
                    self.restart(&mut state, now);
                }
            }
            3 if value >> 6 == 3 => {
                for (number, channel) in state.channels.iter_mut().enumerate() {
                    if value >> (number + 1) & 1 != 0 {
                        channel.read_back(value & 0x20 == 0, value & 0x10 == 0, now);
                    }
                }
            }
            3 => {
                let number = usize::from(value >> 6);
                state.channels[number].control(value, now);
                if number == 0 && value & 0x30 != 0 {
                    self.restart(&mut state, now);
                }
            }
            _ => {}
        }
    }
}

impl TimerHandler for Pit {
    fn expired(&self, now: Nanos) {
        let point = self.lock().tick.next().unwrap_or(now);
        self.ticks.due(point);
    }
}

impl EdgeTicks for Pit {
    fn port(&self) -> &TickPort {
        &self.ticks
    }

    fn base(&self) -> &TimeBase {
        self.timer.base()
    }

    fn with_tick<R>(&self, change: impl FnOnce(&mut Tick) -> R) -> (R, Option<Gsi>) {
        let mut state = self.lock();
        let result = change(&mut state.tick);
        self.timer.set_line(state.tick.deadline());
        (result, Some(self.line.gsi()))
    }
}

impl TickSource for Pit {
    fn offer(&self, slept: bool) {
        self.offer_ticks(slept);
    }

    fn taken(&self) {
        self.tick_taken();
    }

    fn retry(&self) {
        self.tick_unmasked();
    }
}

impl Device for Pit {
    fn name(&self) -> &str {
        "pit"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        let mut state = self.lock();
        let now = self.ticks();
        for (byte, port) in data.iter_mut().zip(at.offset..) {
            *byte = state.channels.get_mut(port as usize).map_or(0xff, |channel| channel.read(now));
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        for (byte, port) in data.iter().zip(at.offset..) {
            self.write_port(port, *byte);
        }
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let now = self.ticks();
        let state = self.lock();
        let mut values: Vec<_> = state
            .channels
            .iter()
            .enumerate()
            .map(|(number, channel)| (format!("channel{number}"), channel.inspect(now)))
            .collect();
        values.push(("next".to_owned(), format!("{:?}", state.tick.next())));
        values.extend(tick_values("ticks", &state.tick));
        values.push(("port61".to_owned(), format!("{:#x}", state.control)));
        values
    }
}

impl std::fmt::Debug for Pit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pit").field("line", &self.line).finish_non_exhaustive()
    }
}

/// System control port B.
struct Port61(Arc<Pit>);

impl Device for Port61 {
    fn name(&self) -> &str {
        "port61"
    }

    fn read(&self, _at: Access, data: &mut [u8]) {
        let state = self.0.lock();
        let now = self.0.timer.base().read();
        let refresh = ((now.0 / REFRESH) & 1) as u8;
        let output = u8::from(state.channels[2].output(now.to_ticks(PIT_HZ)));
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = state.control | refresh << 4 | output << 5;
        }
    }

    fn write(&self, _at: Access, data: &[u8]) {
        if let Some(value) = data.first() {
            let mut state = self.0.lock();
            let now = self.0.ticks();
            state.control = value & 0xf;
            state.channels[2].set_gate(value & 1 != 0, now);
        }
    }
}
