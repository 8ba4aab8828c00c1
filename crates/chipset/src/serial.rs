//! The serial port: a 16550A (National Semiconductor PC16550D data sheet, 1995).
//!
//! A byte that is sent has left at once; a byte that comes waits in a backlog until the receive FIFO has
//! room. The interrupt output is not gated by OUT2.

mod persist;

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex};

use wardian_bus::{Access, Device};
use wardian_irq::Line;

use crate::wire::{Output, Wire, lock};

pub use persist::SerialState;

/// Depth of the receive FIFO.
const FIFO: usize = 16;
/// Bytes that wait in front of the FIFO.
const BACKLOG: usize = 4096;

const IER_RECEIVED: u8 = 1 << 0;
const IER_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_LINE: u8 = 0x06;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;

const LCR_DLAB: u8 = 1 << 7;

const MCR_LOOP: u8 = 1 << 4;

const LSR_DATA: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_IDLE: u8 = 0x60;

/// Modem status of a connected terminal: CTS, DSR and DCD.
const MSR_CONNECTED: u8 = 0xb0;

#[derive(Clone, Debug)]
struct State {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Delta bits of the modem status register.
    msr_delta: u8,
    scratch: u8,
    divisor: u16,
    fifo: VecDeque<u8>,
    backlog: VecDeque<u8>,
    overrun: bool,
    /// The transmitter became empty and nobody took note.
    thr_interrupt: bool,
    wire: Wire,
    sent: u64,
    received: u64,
}

impl State {
    fn depth(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO } else { 1 }
    }

    /// Receive FIFO level from which the data interrupt is "data available" rather than "time-out".
    fn trigger(&self) -> usize {
        if self.fcr & FCR_ENABLE == 0 { 1 } else { [1, 4, 8, 14][usize::from(self.fcr >> 6)] }
    }

    /// Bits 7:4 of the modem status register.
    fn modem(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        // RTS -> CTS, DTR -> DSR, OUT1 -> RI, OUT2 -> DCD
        (self.mcr & 0b10) << 3 | (self.mcr & 0b01) << 5 | (self.mcr & 0b1100) << 4
    }

    fn set_mcr(&mut self, value: u8) {
        let before = self.modem();
        self.mcr = value & 0x1f;
        let (now, changed) = (self.modem(), before ^ self.modem());
        self.msr_delta |= changed >> 4 & 0b1011;
        // The ring indicator counts when it ends.
        if changed & 0x40 != 0 && now & 0x40 == 0 {
            self.msr_delta |= 0b0100;
        }
    }

    fn lsr(&self) -> u8 {
        let mut lsr = LSR_IDLE;
        if !self.fifo.is_empty() {
            lsr |= LSR_DATA;
        }
        if self.overrun {
            lsr |= LSR_OVERRUN;
        }
        lsr
    }

    /// The highest interrupt that waits.
    fn pending(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RECEIVED != 0 && self.fifo.len() >= self.trigger() {
            IIR_RECEIVED
        } else if self.ier & IER_RECEIVED != 0 && !self.fifo.is_empty() {
            IIR_TIMEOUT
        } else if self.ier & IER_EMPTY != 0 && self.thr_interrupt {
            IIR_EMPTY
        } else if self.ier & IER_MODEM != 0 && self.msr_delta != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// Moves the backlog on and brings the interrupt up to date.
    fn settle(&mut self) -> Wire {
        while self.mcr & MCR_LOOP == 0 && self.fifo.len() < self.depth() {
            let Some(byte) = self.backlog.pop_front() else { break };
            self.fifo.push_back(byte);
            self.received += 1;
        }
        self.wire.set(self.pending() != IIR_NONE);
        self.wire
    }

    fn read(&mut self, register: u64) -> u8 {
        let dlab = self.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => self.divisor as u8,
            0 => self.fifo.pop_front().unwrap_or(0),
            1 if dlab => (self.divisor >> 8) as u8,
            1 => self.ier,
            2 => {
                let pending = self.pending();
                if pending == IIR_EMPTY {
                    self.thr_interrupt = false;
                }
                pending | if self.fcr & FCR_ENABLE != 0 { IIR_FIFOS } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let lsr = self.lsr();
                self.overrun = false;
                lsr
            }
            6 => self.modem() | std::mem::take(&mut self.msr_delta),
            7 => self.scratch,
            _ => 0xff,
        }
    }

    /// Writes a register; a byte that leaves the port is returned.
    fn write(&mut self, register: u64, value: u8) -> Option<u8> {
        let dlab = self.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => self.divisor = self.divisor & 0xff00 | u16::from(value),
            0 => {
                self.thr_interrupt = true;
                if self.mcr & MCR_LOOP == 0 {
                    self.sent += 1;
                    return Some(value);
                }
                if self.fifo.len() < self.depth() {
                    self.fifo.push_back(value);
                } else {
                    self.overrun = true;
                }
            }
            1 if dlab => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            1 => {
                if value & IER_EMPTY != 0 && self.ier & IER_EMPTY == 0 {
                    self.thr_interrupt = true;
                }
                self.ier = value & 0x0f;
            }
            2 => {
                // A change of the FIFO enable bit empties the FIFOs.
                if (value ^ self.fcr) & FCR_ENABLE != 0 || value & FCR_CLEAR_RECEIVE != 0 {
                    self.fifo.clear();
                }
                // The other bits are taken only with the FIFOs enabled.
                self.fcr = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
            }
            3 => self.lcr = value,
            4 => self.set_mcr(value),
            7 => self.scratch = value,
            _ => {}
        }
        None
    }
}

/// Called when the backlog has room again after a short [`Serial::push_input`].
pub type SpaceWaker = Box<dyn Fn() + Send + Sync>;

/// One serial port. Locks: `state`, then nothing; `out` and the line are used without it.
pub struct Serial {
    state: Mutex<State>,
    out: Mutex<Box<dyn Write + Send>>,
    line: Output,
    refused: std::sync::atomic::AtomicBool,
    waker: Mutex<Option<Arc<SpaceWaker>>>,
}

impl Serial {
    /// A port whose output goes to `out` (which must not block) and whose interrupt is `line`.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>, line: Line) -> Serial {
        let state = State {
            ier: 0,
            fcr: 0,
            lcr: 0x03,
            mcr: 0,
            msr_delta: 0,
            scratch: 0,
            divisor: 12,
            fifo: VecDeque::with_capacity(FIFO),
            backlog: VecDeque::new(),
            overrun: false,
            thr_interrupt: false,
            wire: Wire::default(),
            sent: 0,
            received: 0,
        };
        Self::build(out, line, state)
    }

    fn build(out: Box<dyn Write + Send>, line: Line, state: State) -> Serial {
        Serial {
            state: Mutex::new(state),
            out: Mutex::new(out),
            line: Output::new(line),
            refused: std::sync::atomic::AtomicBool::new(false),
            waker: Mutex::new(None),
        }
    }

    /// Gives the port bytes from the terminal, from any thread. Says how many it took; the rest is the
    /// caller's to offer again, at the latest when the waker is called.
    pub fn push_input(&self, data: &[u8]) -> usize {
        use std::sync::atomic::Ordering::SeqCst;
        let (taken, wire) = {
            let mut state = lock(&self.state);
            let taken = data.len().min(BACKLOG - state.backlog.len());
            state.backlog.extend(&data[..taken]);
            if taken < data.len() {
                self.refused.store(true, SeqCst);
            }
            (taken, state.settle())
        };
        self.line.publish(wire);
        taken
    }

    /// How many bytes [`Serial::push_input`] would take now.
    #[must_use]
    pub fn input_space(&self) -> usize {
        BACKLOG - lock(&self.state).backlog.len()
    }

    /// Whom to call when there is room again. Called on a vCPU thread: it must not block.
    pub fn set_space_waker(&self, waker: SpaceWaker) {
        *lock(&self.waker) = Some(Arc::new(waker));
    }

    fn after(&self, wire: Wire, space: bool) {
        use std::sync::atomic::Ordering::SeqCst;
        self.line.publish(wire);
        if space && self.refused.swap(false, SeqCst) {
            let waker = lock(&self.waker).clone();
            if let Some(waker) = waker {
                waker();
            }
        }
    }
}

impl Device for Serial {
    fn name(&self) -> &str {
        "serial"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        let (wire, space) = {
            let mut state = lock(&self.state);
            for (register, byte) in (at.offset..).zip(data.iter_mut()) {
                *byte = state.read(register);
            }
            (state.settle(), state.backlog.len() <= BACKLOG / 2)
        };
        self.after(wire, space);
    }

    fn write(&self, at: Access, data: &[u8]) {
        let mut sent = [0u8; 8];
        let mut count = 0;
        let (wire, space) = {
            let mut state = lock(&self.state);
            for (register, byte) in (at.offset..).zip(data) {
                if let (Some(byte), Some(slot)) = (state.write(register, *byte), sent.get_mut(count)) {
                    *slot = byte;
                    count += 1;
                }
            }
            (state.settle(), state.backlog.len() <= BACKLOG / 2)
        };
        if count > 0 && lock(&self.out).write_all(&sent[..count]).is_err() {
            tracing::debug!("Serial output is gone; bytes are dropped");
        }
        self.after(wire, space);
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let state = lock(&self.state);
        let hex = |value: u8| format!("{value:#04x}");
        vec![
            ("ier".into(), hex(state.ier)),
            ("fcr".into(), hex(state.fcr)),
            ("lcr".into(), hex(state.lcr)),
            ("mcr".into(), hex(state.mcr)),
            ("lsr".into(), hex(state.lsr())),
            ("msr".into(), hex(state.modem() | state.msr_delta)),
            ("divisor".into(), state.divisor.to_string()),
            ("fifo".into(), state.fifo.len().to_string()),
            ("backlog".into(), state.backlog.len().to_string()),
            ("interrupt".into(), state.wire.level().to_string()),
            ("sent".into(), state.sent.to_string()),
            ("received".into(), state.received.to_string()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::{BACKLOG, Serial};
    use crate::layout::GSI_COM1;
    use crate::testing::{SharedBuffer, at, read};
    use crate::wire::tests::Recorder;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use wardian_bus::Device;

    fn port() -> (Serial, Arc<Recorder>, SharedBuffer) {
        let chip = Recorder::new();
        let out = SharedBuffer::default();
        (Serial::new(Box::new(out.clone()), chip.line(GSI_COM1)), chip, out)
    }

    fn get(serial: &Serial, register: u64) -> u8 {
        read::<1>(serial, register)[0]
    }

    fn put(serial: &Serial, register: u64, value: u8) {
        serial.write(at(register), &[value]);
    }

    #[test]
    fn sends_and_interrupts_when_empty() {
        let (serial, chip, out) = port();
        put(&serial, 1, 0x02);
        assert!(chip.level(GSI_COM1));
        assert_eq!(get(&serial, 2), 0x02);
        assert!(!chip.level(GSI_COM1));
        assert_eq!(get(&serial, 2), 0x01);
        put(&serial, 0, b'x');
        assert_eq!(out.take(), b"x");
        assert!(chip.level(GSI_COM1));
        assert_eq!(get(&serial, 5), 0x60);
        put(&serial, 1, 0);
        assert!(!chip.level(GSI_COM1));
    }

    #[test]
    fn receives_with_trigger_levels_and_time_out() {
        let (serial, chip, _) = port();
        put(&serial, 2, 0x81); // FIFOs, trigger at 8
        put(&serial, 1, 0x01);
        assert_eq!(serial.push_input(b"abc"), 3);
        assert!(chip.level(GSI_COM1));
        assert_eq!(get(&serial, 2), 0xcc);
        assert_eq!(serial.push_input(b"defgh"), 5);
        assert_eq!(get(&serial, 2), 0xc4);
        for expected in b"abcdefgh" {
            assert_eq!(get(&serial, 5) & 1, 1);
            assert_eq!(get(&serial, 0), *expected);
        }
        assert_eq!(get(&serial, 5) & 1, 0);
        assert!(!chip.level(GSI_COM1));
    }

    #[test]
    fn nothing_is_lost_and_the_backlog_is_bounded() {
        let (serial, _, _) = port();
        let woken = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&woken);
        serial.set_space_waker(Box::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        }));
        let input: Vec<u8> = (0..10_000u32).map(|n| (n * 7) as u8).collect();
        let mut offered = serial.push_input(&input);
        assert_eq!(offered, BACKLOG);
        let mut got = Vec::new();
        while got.len() < input.len() {
            assert_eq!(get(&serial, 5) & 1, 1);
            got.push(get(&serial, 0));
            if woken.swap(0, Ordering::Relaxed) != 0 {
                offered += serial.push_input(&input[offered..]);
            }
        }
        assert_eq!(got, input);
        assert_eq!(serial.input_space(), BACKLOG);
    }

    #[test]
    fn loopback_connects_the_lines_and_the_data() {
        let (serial, chip, out) = port();
        put(&serial, 4, 0x10);
        get(&serial, 6);
        put(&serial, 1, 0x08);
        put(&serial, 4, 0x1a); // loop, RTS and OUT2
        assert!(chip.level(GSI_COM1));
        assert_eq!(get(&serial, 2), 0x00);
        assert_eq!(get(&serial, 6), 0x99); // DCD and CTS, both changed
        assert_eq!(get(&serial, 6), 0x90);
        put(&serial, 4, 0x15); // loop, DTR and OUT1
        assert_eq!(get(&serial, 6) & 0xf4, 0x60);
        put(&serial, 4, 0x10);
        assert_eq!(get(&serial, 6), 0x06); // DSR changed, RI ended
        serial.push_input(b"later");
        put(&serial, 0, 0xae);
        put(&serial, 0, 0xaf);
        assert!(out.take().is_empty());
        assert_eq!(get(&serial, 5), 0x63); // the second overran the one-byte buffer
        assert_eq!(get(&serial, 5), 0x61);
        assert_eq!(get(&serial, 0), 0xae);
        put(&serial, 4, 0x0b);
        assert_eq!(get(&serial, 0), b'l');
    }

    #[test]
    fn divisor_scratch_and_fifo_reset() {
        let (serial, _, _) = port();
        put(&serial, 3, 0x83);
        put(&serial, 0, 0x01);
        put(&serial, 1, 0x00);
        assert_eq!([get(&serial, 0), get(&serial, 1)], [1, 0]);
        put(&serial, 3, 0x03);
        put(&serial, 7, 0x5a);
        assert_eq!(get(&serial, 7), 0x5a);
        assert_eq!(get(&serial, 1), 0);
        put(&serial, 1, 0xff);
        assert_eq!(get(&serial, 1), 0x0f);
        put(&serial, 2, 0x01);
        assert_eq!(get(&serial, 2) & 0xc0, 0xc0);
        serial.push_input(b"z");
        put(&serial, 2, 0x03);
        assert_eq!(get(&serial, 5) & 1, 0);
    }

    #[test]
    fn an_edge_comes_for_input_between_two_reads() {
        let (serial, chip, _) = port();
        put(&serial, 1, 0x01);
        serial.push_input(b"a");
        assert_eq!(chip.edges(GSI_COM1), 1);
        get(&serial, 0);
        serial.push_input(b"b");
        assert_eq!(chip.edges(GSI_COM1), 2);
    }
}
