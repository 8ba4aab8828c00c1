//! What is saved of the PCI root. BARs decode again by the functions' own registers, which are saved with them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, RwLock};

use serde::{Deserialize, Serialize};
use wardian_bus::pci::{ConfigState, Function};
use wardian_state::check::{Wrong, ensure, only_bits};
use wardian_state::{Record, Refused};

use super::bridge::HostBridge;
use super::{ADDRESS_WRITABLE, PciRoot, RESET_WRITABLE, SLOTS};

/// The PCI root as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// The address register of mechanism #1 (CF8h).
    pub config_address: u32,
    /// The reset control register (CF9h).
    pub reset_control: u8,
    /// Configuration space of the host bridge.
    pub bridge: ConfigState,
    /// Names of the functions behind it, from device 1 on.
    pub functions: Vec<String>,
}

impl Record for PciState {
    const KIND: &'static str = "pci";
    const VERSION: u16 = 1;
}

impl PciRoot {
    /// What to save.
    #[must_use]
    pub fn save(&self) -> PciState {
        let functions = self.functions();
        PciState {
            config_address: self.address.load(Ordering::Relaxed),
            reset_control: self.reset_control.load(Ordering::Relaxed),
            bridge: self.bridge.save(),
            functions: functions[1..].iter().map(|function| function.name().to_owned()).collect(),
        }
    }

    /// The bus that was saved as `state`, with `functions`, restored before it, from device 1 on. Nothing is
    /// assigned: their BARs are where the guest has put them.
    ///
    /// # Errors
    /// When a bus cannot be in that state, or had other functions.
    pub fn restore(functions: Vec<Arc<dyn Function>>, state: &PciState) -> Result<Arc<PciRoot>, Refused> {
        let bridge = check(&functions, state).map_err(Wrong::in_record::<PciState>)?;
        let bridge = Arc::new(bridge);
        let mut slots: Vec<Arc<dyn Function>> = vec![Arc::clone(&bridge) as _];
        slots.extend(functions);
        let root = Arc::new(PciRoot {
            bridge,
            slots: RwLock::new(slots),
            map: RwLock::default(),
            refresh: Mutex::default(),
            address: AtomicU32::new(state.config_address),
            reset_control: AtomicU8::new(state.reset_control),
        });
        root.refresh();
        Ok(root)
    }
}

fn check(functions: &[Arc<dyn Function>], state: &PciState) -> Result<HostBridge, Wrong> {
    only_bits("config_address", state.config_address, ADDRESS_WRITABLE)?;
    only_bits("reset_control", state.reset_control, RESET_WRITABLE)?;
    let names: Vec<&str> = functions.iter().map(|function| function.name()).collect();
    let same = names.iter().eq(state.functions.iter()) && names.len() < SLOTS;
    ensure(same, "functions", || {
        format!("{}, where the machine has {}", state.functions.join(", "), names.join(", "))
    })?;
    HostBridge::restore(&state.bridge).map_err(|e| e.within("bridge"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::Probe;
    use super::{PciRoot, PciState};
    use crate::power::tests::Requests;
    use crate::testing::Clock;
    use crate::testing::twin::{self, Random, Twin};
    use std::sync::Arc;
    use wardian_bus::Bus;
    use wardian_bus::pci::Function;
    use wardian_state::Refused;

    struct PciTwin {
        clock: Clock,
        cards: Vec<Arc<dyn Function>>,
        power: Arc<Requests>,
        root: Arc<PciRoot>,
        ports: Bus,
        memory: Bus,
    }

    impl PciTwin {
        fn with(clock: Clock, cards: Vec<Arc<dyn Function>>, root: Arc<PciRoot>) -> PciTwin {
            let (power, mut ports, mut memory) = (Arc::new(Requests::default()), Bus::new(), Bus::new());
            let (range, device) = root.ports(Arc::clone(&power) as _);
            ports.map(range, device).unwrap();
            for (range, device) in root.memory() {
                memory.map(range, device).unwrap();
            }
            PciTwin { clock, cards, power, root, ports, memory }
        }
    }

    impl Twin for PciTwin {
        type State = PciState;

        fn fresh(_random: &mut Random) -> PciTwin {
            let root = PciRoot::new();
            let cards: Vec<Arc<dyn Function>> = vec![Probe::new(0x1000, 0), Probe::new(0x2000, 0x4000)];
            cards.iter().for_each(|card| drop(root.add(Arc::clone(card))));
            root.assign().unwrap();
            PciTwin::with(Clock::new(), cards, root)
        }

        /// The functions live on: they are saved by themselves.
        fn restored(other: &PciTwin, state: &PciState) -> Result<PciTwin, Refused> {
            let root = PciRoot::restore(other.cards.clone(), state)?;
            Ok(PciTwin::with(other.clock.twin(), other.cards.clone(), root))
        }

        fn save(&self) -> PciState {
            self.root.save()
        }

        fn clock(&self) -> &Clock {
            &self.clock
        }

        fn live(&self, random: &mut Random) -> String {
            let mut data = [0; 4];
            // What is written goes to the host bridge: the cards are those of both.
            let register = random.below(0x40) as u32 & !3;
            match random.below(6) {
                0 => {
                    self.ports.write(0, 0xcf8, &(0x8000_0000 | register).to_le_bytes());
                }
                1 => {
                    self.ports.write(0, 0xcf8, &(random.next() as u32 & !0xff_ff00).to_le_bytes());
                }
                2 => {
                    self.ports.write(0, 0xcfc, &(random.next() as u32).to_le_bytes());
                }
                3 => {
                    self.ports.write(0, 0xcf9, &[random.next() as u8]);
                }
                4 => {
                    self.memory.read(0, 0xe000_0000 + 4 * random.below(0x6000), &mut data);
                }
                _ => {
                    self.ports.read(0, random.one_of(&[0xcf8, 0xcfc]), &mut data);
                }
            }
            let mut bar = [0; 4];
            self.memory.read(0, 0xc000_0000 + 4 * random.below(0x1000), &mut bar);
            format!("{data:x?} {bar:x?} {:?} {:?}", self.power.take(), self.root.inspect())
        }
    }

    #[test]
    fn a_restored_bus_lives_on() {
        twin::lives_on::<PciTwin>(150);
        twin::restores_golden::<PciTwin>(|_| 0);
    }

    #[test]
    fn impossible_states_are_refused_by_name() {
        let one = PciTwin::fresh(&mut Random::new(1));
        let refusal = |change: fn(&mut PciState)| twin::refusal(&one, change);
        assert_eq!(refusal(|_| ()), "taken");
        assert_eq!(refusal(|s| s.config_address = 1), "config_address");
        assert_eq!(refusal(|s| s.reset_control = 1), "reset_control");
        assert_eq!(refusal(|s| s.bridge.vendor = 1), "bridge.vendor");
        assert_eq!(refusal(|s| s.bridge.registers.clear()), "bridge.registers");
        assert_eq!(refusal(|s| s.functions.clear()), "functions");
        assert_eq!(refusal(|s| s.functions[0] = "nvme".to_owned()), "functions");
    }
}
