//! The ACPI fixed hardware: PM1 event and control registers, PM timer, one general-purpose event block.
//!
//! Source: ACPI Specification 6.5, 4.8. The machine is always in ACPI mode (`SMI_CMD` is 0, `SCI_EN` is 1).
//!
//! | Offset | Register |
//! |---|---|
//! | 00h | PM1 status (2 bytes, write 1 to clear), PM1 enable (2 bytes) |
//! | 04h | PM1 control (2 bytes) |
//! | 08h | PM timer (4 bytes, 3.579545 MHz, 32 bits) |
//! | 10h | GPE0 status (2 bytes, write 1 to clear), GPE0 enable (2 bytes) |

mod persist;

use std::sync::{Arc, Mutex, OnceLock};

use wardian_bus::{Access, Device};
use wardian_irq::Line;
use wardian_time::{Nanos, TimeBase, Timer, TimerHandler, TimerQueue};

use crate::power::{PowerRequest, PowerSink};
use crate::wire::{Output, Wire, lock};

pub use persist::PmState;

/// Rate of the PM timer in Hz.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// `SLP_TYP` of S5, which the DSDT states in `\_S5`.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Offset of the PM1 event block.
pub const PM1_EVENT: u64 = 0x00;
/// Offset of the PM1 control block.
pub const PM1_CONTROL: u64 = 0x04;
/// Offset of the PM timer.
pub const PM_TIMER: u64 = 0x08;
/// Offset of general-purpose event block 0.
pub const GPE0: u64 = 0x10;

/// PM1 status and enable: the timer's top bit changed.
const TMR: u16 = 1 << 0;
/// PM1 status and enable: release of the global lock.
const GBL: u16 = 1 << 5;
/// PM1 status and enable: power button.
const PWRBTN: u16 = 1 << 8;
/// PM1 enable: RTC alarm. Its status is never set: the alarm has its own interrupt and the FADT says that
/// there is no RTC wake-up status; but Linux installs a handler for it and wants to see the bit stay.
const RTC: u16 = 1 << 10;
/// PM1 enable bits that keep what is written.
const ENABLES: u16 = TMR | GBL | PWRBTN | RTC;

/// PM1 control: SCI rather than SMI; always 1.
const SCI_EN: u16 = 1 << 0;
/// PM1 control bits that keep what is written: bus-master reload and sleep type.
const CONTROL_KEPT: u16 = 1 << 1 | SLP_TYP;
const SLP_TYP: u16 = 7 << 10;
const SLP_EN: u16 = 1 << 13;

#[derive(Clone, Copy, Debug, Default)]
struct State {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// PM timer halves (2^31 ticks) counted so far; a new one sets `TMR`.
    halves: u64,
    sci: Wire,
}

fn ticks(now: Nanos) -> u64 {
    now.to_ticks(PM_TIMER_HZ)
}

impl State {
    fn advance(&mut self, now: Nanos) {
        let halves = ticks(now) >> 31;
        if halves != self.halves {
            self.halves = halves;
            self.status |= TMR;
        }
    }

    /// When the timer's top bit changes next, if anybody wants to know.
    fn deadline(&self) -> Option<Nanos> {
        (self.enable & TMR != 0 && self.status & TMR == 0)
            .then(|| Nanos::from_ticks((self.halves + 1) << 31, PM_TIMER_HZ))
    }

    fn settle(&mut self) -> (Wire, Option<Nanos>) {
        self.sci.set(self.status & self.enable != 0 || self.gpe_status & self.gpe_enable != 0);
        (self.sci, self.deadline())
    }

    fn image(&self, now: Nanos) -> [u8; 32] {
        let mut image = [0; 32];
        let mut put = |at: u64, value: u16| {
            image[at as usize..at as usize + 2].copy_from_slice(&value.to_le_bytes());
        };
        put(PM1_EVENT, self.status);
        put(PM1_EVENT + 2, self.enable);
        put(PM1_CONTROL, self.control | SCI_EN);
        put(PM_TIMER, ticks(now) as u16);
        put(PM_TIMER + 2, (ticks(now) >> 16) as u16);
        put(GPE0, self.gpe_status);
        put(GPE0 + 2, self.gpe_enable);
        image
    }

    /// Writes one byte; whether the guest asked for S5.
    fn write(&mut self, offset: u64, byte: u8) -> bool {
        let (register, shift) = (offset & !1, (offset & 1) * 8);
        let value = u16::from(byte) << shift;
        let keep = !(0xff << shift);
        match register {
            PM1_EVENT => self.status &= !value,
            2 => self.enable = self.enable & keep | value & ENABLES,
            PM1_CONTROL => {
                self.control = self.control & keep | value & CONTROL_KEPT;
                return value & SLP_EN != 0 && (self.control & SLP_TYP) >> 10 == u16::from(SLEEP_TYPE_S5);
            }
            GPE0 => self.gpe_status &= !value,
            0x12 => self.gpe_enable = self.gpe_enable & keep | value,
            _ => {}
        }
        false
    }
}

/// The power-management block. Its lock is a leaf.
pub struct Pm {
    state: Mutex<State>,
    base: Arc<TimeBase>,
    timer: OnceLock<Timer>,
    sci: Output,
    power: Arc<dyn PowerSink>,
}

impl Pm {
    /// A block whose timer is on `queue`, whose interrupt is `sci` and which reports S5 to `power`.
    #[must_use]
    pub fn new(queue: &Arc<TimerQueue>, sci: Line, power: Arc<dyn PowerSink>) -> Arc<Pm> {
        let state = State { halves: ticks(queue.base().now()) >> 31, ..State::default() };
        Self::build(queue, sci, power, state)
    }

    fn build(queue: &Arc<TimerQueue>, sci: Line, power: Arc<dyn PowerSink>, state: State) -> Arc<Pm> {
        let pm = Arc::new(Pm {
            state: Mutex::new(state),
            base: Arc::clone(queue.base()),
            timer: OnceLock::new(),
            sci: Output::new(sci),
            power,
        });
        let handler: std::sync::Weak<Pm> = Arc::downgrade(&pm);
        let _ = pm.timer.set(queue.timer(handler));
        pm
    }

    /// The host's user presses the power button.
    pub fn press_power_button(&self) {
        self.change(|state, _| state.status |= PWRBTN);
    }

    /// Raises general-purpose event `number` (0-15), which the DSDT must have a method for.
    pub fn raise_event(&self, number: u8) {
        if number < 16 {
            self.change(|state, _| state.gpe_status |= 1 << number);
        }
    }

    fn change<R>(&self, change: impl FnOnce(&mut State, Nanos) -> R) -> R {
        let now = self.base.now();
        let (result, wire) = {
            let mut state = lock(&self.state);
            state.advance(now);
            let result = change(&mut state, now);
            let (wire, deadline) = state.settle();
            // Under the lock, so that the newest deadline is the last; the queue's lock is a leaf below.
            if let Some(timer) = self.timer.get() {
                timer.set(deadline);
            }
            (result, wire)
        };
        self.sci.publish(wire);
        result
    }
}

impl TimerHandler for Pm {
    fn expired(&self, _now: Nanos) {
        self.change(|_, _| ());
    }
}

impl Device for Pm {
    fn name(&self) -> &str {
        "pm"
    }

    fn read(&self, at: Access, data: &mut [u8]) {
        // The timer is what is read often: it needs no lock.
        let image = if at.offset & !3 == PM_TIMER {
            State::default().image(self.base.read())
        } else {
            self.change(|state, now| state.image(now))
        };
        for (offset, byte) in (at.offset..).zip(data.iter_mut()) {
            *byte = image.get(offset as usize).copied().unwrap_or(0xff);
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        let off = self.change(|state, _| {
            (at.offset..).zip(data).fold(false, |off, (offset, byte)| off | state.write(offset, *byte))
        });
        if off {
            self.power.request(PowerRequest::PowerOff);
        }
    }

    fn inspect(&self) -> Vec<(String, String)> {
        let state = *lock(&self.state);
        let hex = |value: u16| format!("{value:#06x}");
        vec![
            ("pm1_status".into(), hex(state.status)),
            ("pm1_enable".into(), hex(state.enable)),
            ("pm1_control".into(), hex(state.control | SCI_EN)),
            ("pm_timer".into(), (ticks(self.base.now()) as u32).to_string()),
            ("gpe0_status".into(), hex(state.gpe_status)),
            ("gpe0_enable".into(), hex(state.gpe_enable)),
            ("sci".into(), state.sci.level().to_string()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::{PM_TIMER_HZ, Pm};
    use crate::layout::GSI_SCI;
    use crate::power::PowerRequest;
    use crate::power::tests::Requests;
    use crate::testing::{Clock, at, read};
    use crate::wire::tests::Recorder;
    use std::sync::Arc;
    use wardian_bus::Device;
    use wardian_time::Nanos;

    struct Rig {
        clock: Clock,
        chip: Arc<Recorder>,
        power: Arc<Requests>,
        pm: Arc<Pm>,
    }

    fn rig() -> Rig {
        let clock = Clock::new();
        let (chip, power) = (Recorder::new(), Arc::new(Requests::default()));
        let pm = Pm::new(&clock.queue, chip.line(GSI_SCI), Arc::clone(&power) as _);
        Rig { clock, chip, power, pm }
    }

    fn timer(pm: &Pm) -> u32 {
        u32::from_le_bytes(read(pm, 8))
    }

    #[test]
    fn timer_runs_at_its_rate_and_wraps() {
        let Rig { clock, pm, .. } = rig();
        assert_eq!(timer(&pm), 0);
        clock.run(Nanos::SECOND);
        assert_eq!(timer(&pm), 3_579_545);
        assert_eq!(read::<1>(&*pm, 0x0a), [(3_579_545u32 >> 16) as u8]);
        clock.run(Nanos::from_ticks(1 << 32, PM_TIMER_HZ));
        assert!((3_579_544..=3_579_546).contains(&timer(&pm)));
        // Read only.
        pm.write(at(8), &[0; 4]);
        assert_ne!(timer(&pm), 0);
    }

    #[test]
    fn top_bit_of_the_timer_raises_the_sci() {
        let Rig { clock, chip, pm, .. } = rig();
        pm.write(at(2), &1u16.to_le_bytes());
        clock.run(Nanos::from_ticks((1 << 31) - 10, PM_TIMER_HZ));
        assert!(!chip.level(GSI_SCI));
        clock.run(Nanos(10_000));
        assert!(chip.level(GSI_SCI));
        assert_eq!(read::<2>(&*pm, 0), [1, 0]);
        pm.write(at(0), &[1, 0]);
        assert!(!chip.level(GSI_SCI));
        clock.run(Nanos::from_ticks(1 << 31, PM_TIMER_HZ));
        assert_eq!(chip.edges(GSI_SCI), 2);
    }

    #[test]
    fn soft_off_takes_the_right_type_and_the_enable_bit() {
        let Rig { power, pm, .. } = rig();
        assert_eq!(read::<2>(&*pm, 4), [1, 0]);
        pm.write(at(4), &(1u16 | 5 << 10).to_le_bytes());
        pm.write(at(4), &(1u16 | 3 << 10 | 1 << 13).to_le_bytes());
        assert!(power.take().is_empty());
        assert_eq!(read::<2>(&*pm, 4), (1u16 | 3 << 10).to_le_bytes());
        pm.write(at(4), &(1u16 | 5 << 10 | 1 << 13).to_le_bytes());
        assert_eq!(power.take(), [PowerRequest::PowerOff]);
        pm.write(at(5), &[5 << 2 | 1 << 5]);
        assert_eq!(power.take(), [PowerRequest::PowerOff]);
    }

    #[test]
    fn power_button_waits_for_its_enable_bit() {
        let Rig { chip, pm, .. } = rig();
        pm.press_power_button();
        assert!(!chip.level(GSI_SCI));
        assert_eq!(read::<2>(&*pm, 0), [0, 1]);
        pm.write(at(2), &0x0120u16.to_le_bytes());
        assert!(chip.level(GSI_SCI));
        pm.write(at(0), &0x0100u16.to_le_bytes());
        assert!(!chip.level(GSI_SCI));
        pm.press_power_button();
        assert_eq!(chip.edges(GSI_SCI), 2);
    }

    #[test]
    fn enable_bits_of_fixed_events_stay() {
        let Rig { pm, .. } = rig();
        pm.write(at(2), &0xffffu16.to_le_bytes());
        assert_eq!(read::<2>(&*pm, 2), 0x0521u16.to_le_bytes());
        pm.write(at(2), &[0, 0]);
        assert_eq!(read::<2>(&*pm, 2), [0, 0]);
    }

    #[test]
    fn general_purpose_events() {
        let Rig { chip, pm, .. } = rig();
        pm.write(at(0x12), &4u16.to_le_bytes());
        pm.raise_event(1);
        pm.raise_event(200);
        assert!(!chip.level(GSI_SCI));
        pm.raise_event(2);
        assert!(chip.level(GSI_SCI));
        assert_eq!(read::<4>(&*pm, 0x10), [6, 0, 4, 0]);
        pm.write(at(0x10), &[4]);
        assert!(!chip.level(GSI_SCI));
    }

    #[test]
    fn odd_accesses_stay_inside() {
        let Rig { pm, .. } = rig();
        pm.write(at(0x1c), &[0xff; 8]);
        assert_eq!(read::<8>(&*pm, 0x1c), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    }
}
