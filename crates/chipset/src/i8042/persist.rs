//! What is saved of the keyboard controller. It has no interrupt line to re-raise.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wardian_state::{Record, Refused};

use super::{Expect, I8042, State};
use crate::power::PowerSink;
use crate::wire::lock;

/// What the next byte to the data port of a saved controller is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpectState {
    /// The keyboard.
    Keyboard,
    /// The command byte.
    CommandByte,
    /// The output port.
    OutputPort,
    /// The output buffer.
    OutputBuffer,
    /// The mouse.
    Mouse,
}

/// The controller as it is saved. Any combination is possible.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// Command byte.
    pub command_byte: u8,
    /// A byte that the guest has not read.
    pub output: Option<u8>,
    /// The byte that it read last.
    pub last_output: u8,
    /// What the next byte is for.
    pub expects: ExpectState,
    /// The last write went to the command port.
    pub last_was_command: bool,
}

impl Record for I8042State {
    const KIND: &'static str = "i8042";
    const VERSION: u16 = 1;
}

impl I8042 {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> I8042State {
        let state = *lock(&self.shared.state);
        I8042State {
            command_byte: state.command_byte,
            output: state.output,
            last_output: state.last_output,
            expects: match state.expect {
                Expect::Keyboard => ExpectState::Keyboard,
                Expect::CommandByte => ExpectState::CommandByte,
                Expect::OutputPort => ExpectState::OutputPort,
                Expect::OutputBuffer => ExpectState::OutputBuffer,
                Expect::Mouse => ExpectState::Mouse,
            },
            last_was_command: state.last_was_command,
        }
    }

    /// The controller that was saved as `state`, to be built as [`I8042::new`] says.
    ///
    /// # Errors
    /// None in this version.
    pub fn restore(power: Arc<dyn PowerSink>, state: &I8042State) -> Result<I8042, Refused> {
        Ok(I8042::build(
            power,
            State {
                command_byte: state.command_byte,
                output: state.output,
                last_output: state.last_output,
                expect: match state.expects {
                    ExpectState::Keyboard => Expect::Keyboard,
                    ExpectState::CommandByte => Expect::CommandByte,
                    ExpectState::OutputPort => Expect::OutputPort,
                    ExpectState::OutputBuffer => Expect::OutputBuffer,
                    ExpectState::Mouse => Expect::Mouse,
                },
                last_was_command: state.last_was_command,
            },
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::{I8042, I8042State};
    use crate::power::tests::Requests;
    use crate::testing::Clock;
    use crate::testing::twin::{self, Random, Twin};
    use std::sync::Arc;
    use wardian_bus::Bus;
    use wardian_state::Refused;

    struct I8042Twin {
        clock: Clock,
        power: Arc<Requests>,
        controller: I8042,
        bus: Bus,
    }

    impl I8042Twin {
        fn with(clock: Clock, controller: I8042, power: Arc<Requests>) -> I8042Twin {
            let mut bus = Bus::new();
            for (range, device) in controller.ports() {
                bus.map(range, device).unwrap();
            }
            I8042Twin { clock, power, controller, bus }
        }
    }

    impl Twin for I8042Twin {
        type State = I8042State;

        fn fresh(_random: &mut Random) -> I8042Twin {
            let power = Arc::new(Requests::default());
            I8042Twin::with(Clock::new(), I8042::new(Arc::clone(&power) as _), power)
        }

        fn restored(other: &I8042Twin, state: &I8042State) -> Result<I8042Twin, Refused> {
            let power = Arc::new(Requests::default());
            let controller = I8042::restore(Arc::clone(&power) as _, state)?;
            Ok(I8042Twin::with(other.clock.twin(), controller, power))
        }

        fn save(&self) -> I8042State {
            self.controller.save()
        }

        fn clock(&self) -> &Clock {
            &self.clock
        }

        fn live(&self, random: &mut Random) -> String {
            let (mut data, port) = ([0], random.one_of(&[0x60, 0x64, 0x92]));
            if random.once_in(2) {
                self.bus.read(0, port, &mut data);
            } else {
                let command =
                    [0x20, 0x60, 0xa7, 0xaa, 0xab, 0xd0, 0xd1, 0xd2, 0xd4, 0xfe, random.clone().next() as u8];
                self.bus.write(0, port, &[random.one_of(&command)]);
            }
            format!("{data:?} {:?}", self.power.take())
        }
    }

    #[test]
    fn a_restored_controller_lives_on() {
        twin::lives_on::<I8042Twin>(200);
        twin::restores_golden::<I8042Twin>(|_| 0);
    }

    #[test]
    fn what_is_no_state_cannot_be_read() {
        let mut value = serde_json::to_value(I8042Twin::fresh(&mut Random::new(1)).save()).unwrap();
        value["expects"] = "joystick".into();
        let error = serde_json::from_value::<I8042State>(value.clone()).unwrap_err();
        assert!(error.to_string().contains("joystick"), "{error}");
        value["expects"] = "mouse".into();
        value["command_byte"] = 256.into();
        assert!(serde_json::from_value::<I8042State>(value).is_err());
    }
}
