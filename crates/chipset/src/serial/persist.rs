//! What is saved of the serial port. It re-raises its line if an enabled interrupt waits.

use std::io::Write;

use serde::{Deserialize, Serialize};
use wardian_irq::Line;
use wardian_state::check::{Wrong, at_most, ensure, only_bits};
use wardian_state::{Record, Refused, hex};

use super::{BACKLOG, FCR_ENABLE, MCR_LOOP, Serial, State};
use crate::wire::{Wire, lock};

/// The serial port as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Interrupt enable register.
    pub ier: u8,
    /// FIFO control register.
    pub fcr: u8,
    /// Line control register.
    pub lcr: u8,
    /// Modem control register.
    pub mcr: u8,
    /// Delta bits of the modem status register.
    pub msr_delta: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Divisor latch.
    pub divisor: u16,
    /// Received bytes.
    #[serde(with = "hex")]
    pub fifo: Vec<u8>,
    /// Bytes from the terminal that wait for room.
    #[serde(with = "hex")]
    pub backlog: Vec<u8>,
    /// A byte was lost and the guest does not know yet.
    pub overrun: bool,
    /// The transmitter became empty and nobody took note.
    pub empty_pending: bool,
    /// Bytes sent so far.
    pub sent: u64,
    /// Bytes received so far.
    pub received: u64,
}

impl Record for SerialState {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 1;
}

impl Serial {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> SerialState {
        let state = lock(&self.state);
        SerialState {
            ier: state.ier,
            fcr: state.fcr,
            lcr: state.lcr,
            mcr: state.mcr,
            msr_delta: state.msr_delta,
            scratch: state.scratch,
            divisor: state.divisor,
            fifo: state.fifo.iter().copied().collect(),
            backlog: state.backlog.iter().copied().collect(),
            overrun: state.overrun,
            empty_pending: state.thr_interrupt,
            sent: state.sent,
            received: state.received,
        }
    }

    /// The port that was saved as `state`, to be built as [`Serial::new`] says.
    ///
    /// # Errors
    /// When a port cannot be in that state.
    pub fn restore(out: Box<dyn Write + Send>, line: Line, state: &SerialState) -> Result<Serial, Refused> {
        let registers = State::restore(state).map_err(Wrong::in_record::<SerialState>)?;
        let serial = Serial::build(out, line, registers);
        let wire = lock(&serial.state).settle();
        serial.line.publish(wire);
        Ok(serial)
    }
}

impl State {
    fn restore(saved: &SerialState) -> Result<State, Wrong> {
        only_bits("ier", saved.ier, 0x0fu8)?;
        only_bits("fcr", saved.fcr, 0xc9u8)?;
        ensure(saved.fcr & FCR_ENABLE != 0 || saved.fcr == 0, "fcr", || "the FIFOs are off")?;
        only_bits("mcr", saved.mcr, 0x1fu8)?;
        only_bits("msr_delta", saved.msr_delta, 0x0fu8)?;
        let state = State {
            ier: saved.ier,
            fcr: saved.fcr,
            lcr: saved.lcr,
            mcr: saved.mcr,
            msr_delta: saved.msr_delta,
            scratch: saved.scratch,
            divisor: saved.divisor,
            fifo: saved.fifo.iter().copied().collect(),
            backlog: saved.backlog.iter().copied().collect(),
            overrun: saved.overrun,
            thr_interrupt: saved.empty_pending,
            wire: Wire::default(),
            sent: saved.sent,
            received: saved.received,
        };
        at_most("fifo", state.fifo.len() as u64, state.depth() as u64)?;
        at_most("backlog", state.backlog.len() as u64, BACKLOG as u64)?;
        let full = state.mcr & MCR_LOOP != 0 || state.fifo.len() == state.depth();
        ensure(full || state.backlog.is_empty(), "backlog", || "bytes wait although there is room")?;
        // What is counted from here on does not overflow.
        at_most("sent", state.sent, u64::MAX >> 1)?;
        at_most("received", state.received, u64::MAX >> 1)?;
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::{Serial, SerialState};
    use crate::layout::GSI_COM1;
    use crate::testing::twin::{self, Random, Twin};
    use crate::testing::{Clock, SharedBuffer, at};
    use crate::wire::tests::Recorder;
    use std::sync::Arc;
    use wardian_bus::Device;
    use wardian_state::Refused;

    struct SerialTwin {
        clock: Clock,
        chip: Arc<Recorder>,
        out: SharedBuffer,
        serial: Serial,
    }

    impl Twin for SerialTwin {
        type State = SerialState;

        fn fresh(_random: &mut Random) -> SerialTwin {
            let (chip, out) = (Recorder::new(), SharedBuffer::default());
            let serial = Serial::new(Box::new(out.clone()), chip.line(GSI_COM1));
            SerialTwin { clock: Clock::new(), chip, out, serial }
        }

        fn restored(other: &SerialTwin, state: &SerialState) -> Result<SerialTwin, Refused> {
            let (chip, out) = (Recorder::new(), SharedBuffer::default());
            let serial = Serial::restore(Box::new(out.clone()), chip.line(GSI_COM1), state)?;
            Ok(SerialTwin { clock: other.clock.twin(), chip, out, serial })
        }

        fn save(&self) -> SerialState {
            self.chip.news();
            self.serial.save()
        }

        fn clock(&self) -> &Clock {
            &self.clock
        }

        fn live(&self, random: &mut Random) -> String {
            let mut data = [0; 1];
            match random.below(8) {
                0 => {
                    let len = random.one_of(&[1, 3, 20, 3000]);
                    data[0] = self.serial.push_input(&vec![random.next() as u8; len]) as u8;
                }
                1..4 => self.serial.write(at(random.below(8)), &[random.next() as u8]),
                4 => self.serial.write(at(3), &[3]),
                _ => self.serial.read(at(random.below(8)), &mut data),
            }
            format!("{data:?} {:?} {:?} {}", self.chip.news(), self.out.take(), self.serial.input_space())
        }

        fn raised(&self) -> Vec<u32> {
            self.chip.high()
        }
    }

    #[test]
    fn a_restored_port_lives_on() {
        twin::lives_on::<SerialTwin>(300);
        twin::is_not_upset::<SerialTwin>(60);
        twin::restores_golden::<SerialTwin>(|_| 0);
    }

    #[test]
    fn impossible_states_are_refused_by_name() {
        let one = SerialTwin::fresh(&mut Random::new(1));
        let refusal = |change: fn(&mut SerialState)| twin::refusal(&one, change);
        assert_eq!(refusal(|_| ()), "taken");
        assert_eq!(refusal(|s| s.ier = 0x10), "ier");
        assert_eq!(refusal(|s| s.fcr = 0xc0), "fcr");
        assert_eq!(refusal(|s| s.fcr = 0x03), "fcr");
        assert_eq!(refusal(|s| s.mcr = 0x20), "mcr");
        assert_eq!(refusal(|s| s.msr_delta = 0x10), "msr_delta");
        assert_eq!(refusal(|s| s.fifo = vec![1, 2]), "fifo");
        assert_eq!(refusal(|s| s.backlog = vec![1]), "backlog");
        assert_eq!(refusal(|s| (s.fifo, s.backlog) = (vec![1], vec![0; 4097])), "backlog");
        assert_eq!(refusal(|s| s.received = u64::MAX), "received");
    }
}
