//! Chips and timers together: a tick that is on its way when the board is saved arrives once after the restore.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use wardian_bus::Device;
use wardian_irq::{Due, Gsi, IrqChip, Kick, Line, LocalInterrupts};
use wardian_state::{Record, Refused};
use wardian_time::{Nanos, TickConfig, TickPolicy};

use super::{IrqChipState, SoftIrqChip};
use crate::hpet::{Hpet, HpetState, LegacyRouting};
use crate::layout::{GSI_RTC, GSI_SCI, GSI_TIMER};
use crate::pit::{Pit, PitState};
use crate::pm::{Pm, PmState};
use crate::power::tests::Requests;
use crate::rtc::{MemorySize, Rtc, RtcState};
use crate::testing::twin::{self, Random, Twin};
use crate::testing::{Clock, at};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct BoardState {
    chips: IrqChipState,
    hpet: HpetState,
    pit: PitState,
    rtc: RtcState,
    pm: PmState,
}

impl Record for BoardState {
    const KIND: &'static str = "board";
    const VERSION: u16 = 1;
}

struct Sleeper(AtomicBool);

impl Kick for Sleeper {
    fn kick(&self) {}
    fn slept_at(&self, _point: Nanos) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

struct Board {
    clock: Clock,
    ticks: TickConfig,
    chip: Arc<SoftIrqChip>,
    local: Arc<dyn LocalInterrupts>,
    sleeper: Arc<Sleeper>,
    hpet: Arc<Hpet>,
    pit: Arc<Pit>,
    rtc: Arc<Rtc>,
    pm: Arc<Pm>,
}

impl Board {
    fn with(
        clock: Clock,
        ticks: TickConfig,
        chip: Arc<SoftIrqChip>,
        asleep: bool,
        make: impl FnOnce(&Clock, &Arc<dyn IrqChip>) -> Result<(Arc<Hpet>, Arc<Pit>, Arc<Rtc>, Arc<Pm>), Refused>,
    ) -> Result<Board, Refused> {
        let irqs = Arc::clone(&chip) as Arc<dyn IrqChip>;
        let (local, sleeper) = (chip.local(0).unwrap(), Arc::new(Sleeper(AtomicBool::new(asleep))));
        local.attach(Arc::clone(&sleeper) as _);
        let (hpet, pit, rtc, pm) = make(&clock, &irqs)?;
        Ok(Board { clock, ticks, chip, local, sleeper, hpet, pit, rtc, pm })
    }

    fn new(clock: Clock, ticks: TickConfig) -> Board {
        let chip = SoftIrqChip::with_ticks(1, &clock.queue, ticks);
        Board::with(clock, ticks, chip, false, |clock, irqs| {
            let routing = LegacyRouting::default();
            let line = |gsi: Gsi| Line::new(Arc::clone(irqs), gsi);
            let hpet = Hpet::new(&clock.queue, irqs, routing.clone(), ticks);
            let pit = Pit::new(&clock.queue, routing.gate(line(GSI_TIMER)), ticks);
            let rtc = Rtc::new(&clock.queue, line(GSI_RTC), MemorySize::default(), routing, ticks);
            Ok((hpet, pit, rtc, Pm::new(&clock.queue, line(GSI_SCI), Arc::new(Requests::default()))))
        })
        .unwrap()
    }

    fn ports(&self, address: u64, value: u8) {
        for (range, device) in
            self.chip.pic_devices().into_iter().filter(|(range, _)| range.contains(&address))
        {
            device.write(at(address - range.start), &[value]);
        }
    }

    fn entry(&self, pin: u8, low: u32) {
        let page = self.chip.ioapic_device();
        page.write(at(0), &[0x10 + 2 * pin]);
        page.write(at(0x10), &low.to_le_bytes());
    }

    fn rtc(&self, register: u8, value: u8) {
        self.rtc.write(at(0), &[register]);
        self.rtc.write(at(1), &[value]);
    }

    fn apic(&self, register: u64, value: u32) {
        self.chip.lapic_device().write(at(register << 4), &value.to_le_bytes());
    }

    /// Rates as guests set them.
    fn set_up(&self, random: &mut Random) {
        match random.below(8) {
            0 => {
                let divisor = random.one_of(&[1193u16, 1193, 4773, 300]);
                self.pit.write(at(3), &[random.one_of(&[0x34, 0x36, 0x30])]);
                divisor.to_le_bytes().iter().for_each(|byte| self.pit.write(at(0), &[*byte]));
            }
            1 => {
                self.rtc(0x0a, random.one_of(&[0x26, 0x23, 0x29]));
                self.rtc(0x0b, random.one_of(&[0x42, 0x52, 0x02]));
            }
            2 => {
                self.hpet.write(at(0x10), &u64::to_le_bytes(random.one_of(&[1, 1, 1, 3])));
                let index = random.below(3);
                let timer = 0x100 + 0x20 * index;
                let edge_or_level = random.one_of(&[0x4c, 0x4c, 0x4e]);
                self.hpet
                    .write(at(timer), &u64::to_le_bytes(edge_or_level | ([20, 21, 23][index as usize] << 9)));
                for _ in 0..2 {
                    self.hpet.write(at(timer + 8), &u64::to_le_bytes(100_000));
                }
            }
            3 => {
                self.apic(0x32, random.one_of(&[0x2_00ef, 0x2_00ef, 0x1_00ef, 0x0_00ef]));
                self.apic(0x3e, 0xb);
                self.apic(0x38, random.one_of(&[1_000_000, 100_000]));
            }
            4 => {
                for pin in [2, 8, 9, 20, 21, 23] {
                    let level = if pin == 9 || random.once_in(8) { 0x8000 } else { 0 };
                    let masked = if random.once_in(3) { 0x1_0000 } else { 0 };
                    self.entry(pin, (0x30 + u32::from(pin)) | level | masked);
                }
            }
            5 => self.apic(0x0f, random.one_of(&[0x1ff, 0x1ff, 0x0ff])),
            6 => {
                for (port, value) in [
                    (0x20, 0x11),
                    (0x21, 0x20),
                    (0x21, 4),
                    (0x21, 1),
                    (0xa0, 0x11),
                    (0xa1, 0x28),
                    (0xa1, 2),
                    (0xa1, 1),
                ] {
                    self.ports(port, value);
                }
                self.ports(0x21, random.one_of(&[0xff, 0xfa, 0xff]));
                self.ports(0xa1, random.one_of(&[0xff, 0xfe, 0xff]));
            }
            _ => {
                self.pm.write(at(2), &0x0101u16.to_le_bytes());
                self.pm.press_power_button();
            }
        }
    }
}

impl Twin for Board {
    type State = BoardState;

    fn fresh(random: &mut Random) -> Board {
        let clock = Clock::at_wall(Nanos(1_795_522_000_123_456_789));
        let policy = random.one_of(&[
            TickPolicy::LateOne,
            TickPolicy::Replay,
            TickPolicy::ReplaySlew,
            TickPolicy::Sync,
            TickPolicy::Async,
        ]);
        let ticks = TickConfig { policy, align: random.once_in(2) };
        let board = Board::new(clock, ticks);
        board.apic(0x0f, 0x1ff);
        for _ in 0..30 {
            board.set_up(random);
        }
        board
    }

    fn restored(other: &Board, state: &BoardState) -> Result<Board, Refused> {
        let (clock, ticks) = (other.clock.twin(), other.ticks);
        let chip = SoftIrqChip::restore(1, &clock.queue, ticks, &state.chips)?;
        let asleep = other.sleeper.0.load(Ordering::Relaxed);
        let board = Board::with(clock, ticks, chip, asleep, |clock, irqs| {
            let routing = LegacyRouting::default();
            let line = |gsi: Gsi| Line::new(Arc::clone(irqs), gsi);
            let hpet = Hpet::restore(&clock.queue, irqs, routing.clone(), ticks, &state.hpet)?;
            let pit = Pit::restore(&clock.queue, routing.gate(line(GSI_TIMER)), ticks, &state.pit)?;
            let rtc = Rtc::restore(&clock.queue, line(GSI_RTC), routing, ticks, &state.rtc)?;
            let pm = Pm::restore(&clock.queue, line(GSI_SCI), Arc::new(Requests::default()), &state.pm)?;
            Ok((hpet, pit, rtc, pm))
        })?;
        board.chip.settle_lines();
        Ok(board)
    }

    fn save(&self) -> BoardState {
        let (hpet, pit, rtc, pm) = (self.hpet.save(), self.pit.save(), self.rtc.save(), self.pm.save());
        BoardState { chips: self.chip.save(), hpet, pit, rtc, pm }
    }

    fn clock(&self) -> &Clock {
        &self.clock
    }

    fn live(&self, random: &mut Random) -> String {
        let mut data = [0; 8];
        match random.below(16) {
            0 => self.set_up(random),
            1 => self.sleeper.0.store(random.once_in(2), Ordering::Relaxed),
            2 => {
                self.rtc.write(at(0), &[0x0c]);
                self.rtc.read(at(1), &mut data[..1]);
            }
            3 => self.hpet.write(at(0x20), &7u64.to_le_bytes()),
            4 => self.hpet.read(at(0xf0), &mut data),
            5 => self.pm.write(at(0), &[0, 1]),
            6 => self.pit.read(at(0), &mut data[..1]),
            7 | 8 => self.clock.run(random.span()),
            9 => self.ports(0x20, 0x20),
            10 => self.ports(0xa0, 0x20),
            _ => {
                let mut vectors = Vec::new();
                for _ in 0..random.below(4) {
                    let pending = self.local.pending();
                    vectors.push((pending, if pending.interrupt { self.local.acknowledge() } else { None }));
                    if random.once_in(2) {
                        self.apic(0x0b, 0);
                    }
                }
                return format!("{vectors:?}");
            }
        }
        format!("{data:?}")
    }
}

#[test]
fn a_restored_board_lives_on() {
    twin::lives_on::<Board>(300);
    twin::is_not_upset::<Board>(60);
}

/// Saved between "due" and "offered", and between "raised" and "taken".
#[test]
fn a_tick_on_its_way_arrives_once() {
    let board = Board::new(Clock::new(), TickConfig::default());
    board.apic(0x0f, 0x1ff);
    board.entry(2, 0x32);
    board.pit.write(at(3), &[0x34]);
    board.pit.write(at(0), &[0xa9]);
    board.pit.write(at(0), &[0x04]);
    board.clock.run(Nanos(1_000_000));
    let due = board.save();
    assert_eq!((due.pit.link.due, due.pit.tick.counts.delivered), (Due::Waits, 0));
    let two = Board::restored(&board, &due).unwrap();
    assert!(two.local.pending().interrupt);
    let raised = two.save();
    assert_eq!(raised.pit.link.awaited.and_then(|awaited| awaited.vector), Some(0x32));
    let three = Board::restored(&two, &raised).unwrap();
    assert_eq!((three.local.acknowledge(), three.local.acknowledge()), (Some(0x32), None));
    let taken = three.save();
    assert_eq!((taken.pit.link.awaited, taken.pit.tick.counts.delivered), (None, 1));
    assert_eq!(taken.pit.tick.raised_at_ns, None);
}
