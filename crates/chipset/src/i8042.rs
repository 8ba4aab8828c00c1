//! The keyboard controller, of which only the controller is there: no keyboard, no mouse.
//!
//! It answers the commands of the IBM PC/AT controller (8042) that boot code and operating systems send
//! to find out what is connected, and pulses the reset line. The ACPI tables say that there is none.

mod persist;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use wardian_bus::{Access, Device};

use crate::layout;
use crate::power::{PowerRequest, PowerSink};
use crate::wire::lock;

pub use persist::{ExpectState, I8042State};

/// Status: output buffer full.
const STATUS_OBF: u8 = 1 << 0;
/// Status: self-test passed.
const STATUS_SYSTEM: u8 = 1 << 2;
/// Status: the last write went to the command port.
const STATUS_COMMAND: u8 = 1 << 3;
/// Status: keyboard not locked.
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Output port: not in reset, A20 open.
const OUTPUT_PORT: u8 = 0b11;

/// What the next write to the data port is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expect {
    #[default]
    Keyboard,
    CommandByte,
    OutputPort,
    OutputBuffer,
    Mouse,
}

#[derive(Clone, Copy, Debug)]
struct State {
    command_byte: u8,
    output: Option<u8>,
    last_output: u8,
    expect: Expect,
    last_was_command: bool,
}

impl State {
    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED | self.command_byte & STATUS_SYSTEM;
        if self.output.is_some() {
            status |= STATUS_OBF;
        }
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        status
    }

    /// Carries out `command`; whether it resets the machine.
    fn command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.expect = Expect::Keyboard;
        match command {
            0x20 => self.output = Some(self.command_byte),
            0x60 => self.expect = Expect::CommandByte,
            0xa7 => self.command_byte |= 1 << 5,
            0xa8 => self.command_byte &= !(1 << 5),
            // Test the mouse port: clock line stuck, which is how no port shows.
            0xa9 => self.output = Some(0x01),
            0xaa => {
                self.command_byte |= STATUS_SYSTEM;
                self.output = Some(0x55);
            }
            0xab => self.output = Some(0x00),
            0xad => self.command_byte |= 1 << 4,
            0xae => self.command_byte &= !(1 << 4),
            0xc0 => self.output = Some(0x80),
            0xd0 => self.output = Some(OUTPUT_PORT),
            0xd1 => self.expect = Expect::OutputPort,
            0xd2 | 0xd3 => self.expect = Expect::OutputBuffer,
            0xd4 => self.expect = Expect::Mouse,
            // Pulse the output lines whose bit is 0; line 0 is the processor's reset.
            0xf0..=0xff => return command & 1 == 0,
            _ => {}
        }
        false
    }

    /// Takes a byte written to the data port; whether it resets the machine.
    fn data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match std::mem::take(&mut self.expect) {
            Expect::CommandByte => self.command_byte = value,
            Expect::OutputPort => return value & 1 == 0,
            Expect::OutputBuffer => self.output = Some(value),
            // Nobody is connected, nobody answers.
            Expect::Keyboard | Expect::Mouse => {}
        }
        false
    }
}

struct Shared {
    state: Mutex<State>,
    power: Arc<dyn PowerSink>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Port {
    Data,
    Command,
    ControlA,
}

struct Face {
    shared: Arc<Shared>,
    port: Port,
}

/// The controller and system control port A.
pub struct I8042 {
    shared: Arc<Shared>,
}

impl I8042 {
    /// A controller that reports resets to `power`.
    #[must_use]
    pub fn new(power: Arc<dyn PowerSink>) -> I8042 {
        let state = State {
            command_byte: STATUS_SYSTEM | 0b11_0000,
            output: None,
            last_output: 0,
            expect: Expect::Keyboard,
            last_was_command: false,
        };
        Self::build(power, state)
    }

    fn build(power: Arc<dyn PowerSink>, state: State) -> I8042 {
        I8042 { shared: Arc::new(Shared { state: Mutex::new(state), power }) }
    }

    /// Its ports, 60h, 64h and 92h, to be put on the port bus.
    #[must_use]
    pub fn ports(&self) -> Vec<(Range<u64>, Arc<dyn Device>)> {
        let face = |port| Arc::new(Face { shared: Arc::clone(&self.shared), port }) as Arc<dyn Device>;
        vec![
            (layout::I8042_DATA, face(Port::Data)),
            (layout::I8042_COMMAND, face(Port::Command)),
            (layout::PORT_92, face(Port::ControlA)),
        ]
    }
}

impl Device for Face {
    fn name(&self) -> &str {
        match self.port {
            Port::Data => "i8042-data",
            Port::Command => "i8042",
            Port::ControlA => "port92",
        }
    }

    fn read(&self, _at: Access, data: &mut [u8]) {
        data.fill(0xff);
        let Some(byte) = data.first_mut() else { return };
        let mut state = lock(&self.shared.state);
        *byte = match self.port {
            Port::Command => state.status(),
            Port::ControlA => 0b10,
            Port::Data => {
                if let Some(value) = state.output.take() {
                    state.last_output = value;
                }
                state.last_output
            }
        };
    }

    fn write(&self, _at: Access, data: &[u8]) {
        let Some(value) = data.first().copied() else { return };
        let reset = match self.port {
            Port::Command => lock(&self.shared.state).command(value),
            Port::Data => lock(&self.shared.state).data(value),
            Port::ControlA => value & 1 != 0,
        };
        if reset {
            self.shared.power.request(PowerRequest::Reset);
        }
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let state = *lock(&self.shared.state);
        match self.port {
            Port::Command => vec![
                ("status".into(), format!("{:#04x}", state.status())),
                ("command_byte".into(), format!("{:#04x}", state.command_byte)),
            ],
            Port::Data => vec![("output".into(), format!("{:?}", state.output))],
            Port::ControlA => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::I8042;
    use crate::power::PowerRequest;
    use crate::power::tests::Requests;
    use std::sync::Arc;
    use wardian_bus::Bus;

    fn machine() -> (Bus, Arc<Requests>) {
        let power = Arc::new(Requests::default());
        let mut bus = Bus::new();
        for (range, device) in I8042::new(Arc::clone(&power) as _).ports() {
            bus.map(range, device).unwrap();
        }
        (bus, power)
    }

    fn read(bus: &Bus, port: u64) -> u8 {
        let mut byte = [0];
        bus.read(0, port, &mut byte);
        byte[0]
    }

    #[test]
    fn self_test_and_command_byte() {
        let (bus, power) = machine();
        assert_eq!(read(&bus, 0x64) & 3, 0);
        bus.write(0, 0x64, &[0xaa]);
        assert_eq!(read(&bus, 0x64) & 1, 1);
        assert_eq!(read(&bus, 0x60), 0x55);
        assert_eq!(read(&bus, 0x64) & 1, 0);
        bus.write(0, 0x64, &[0x60]);
        bus.write(0, 0x60, &[0x47]);
        bus.write(0, 0x64, &[0x20]);
        assert_eq!(read(&bus, 0x60), 0x47);
        // The keyboard is asked to reset itself and stays silent.
        bus.write(0, 0x60, &[0xff]);
        assert_eq!(read(&bus, 0x64) & 1, 0);
        assert!(power.take().is_empty());
    }

    #[test]
    fn three_ways_to_reset() {
        for writes in [&[(0x64, 0xfe)][..], &[(0x64, 0xd1), (0x60, 0xfe)], &[(0x92, 0x03)]] {
            let (bus, power) = machine();
            for (port, value) in writes {
                bus.write(0, *port, &[*value]);
            }
            assert_eq!(power.take(), [PowerRequest::Reset], "{writes:x?}");
        }
        let (bus, power) = machine();
        for (port, value) in [(0x64, 0xff), (0x92, 0x02), (0x64, 0xd1), (0x60, 0x03)] {
            bus.write(0, port, &[value]);
        }
        assert!(power.take().is_empty());
    }
}
