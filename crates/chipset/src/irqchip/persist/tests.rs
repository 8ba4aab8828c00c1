use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use wardian_irq::{Gsi, IrqChip, Kick, LocalInterrupts, MsiMessage};
use wardian_state::{Record, Refused};
use wardian_time::{
    Nanos, RunState, TickConfig, TickPolicy, TickState, TimeBase, TimeConfig, TimerQueue, TscMode,
};

use super::{IrqChipState, SoftIrqChip};
use crate::pic::persist::InitState;
use crate::testing::twin::{self, Random, Twin};
use crate::testing::{Clock, at};

const CPUS: usize = 3;
const TSC_DEADLINE: u32 = 0x6e0;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
struct Chips(IrqChipState);

impl Record for Chips {
    const KIND: &'static str = "irqchip";
    const VERSION: u16 = 1;
}

#[derive(Default)]
struct Kicks(AtomicUsize);

impl Kick for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct ChipTwin {
    clock: Clock,
    chip: Arc<SoftIrqChip>,
    ticks: TickConfig,
    locals: Vec<Arc<dyn LocalInterrupts>>,
    kicks: Arc<Kicks>,
}

impl ChipTwin {
    fn with(clock: Clock, chip: Arc<SoftIrqChip>, ticks: TickConfig) -> ChipTwin {
        let kicks = Arc::new(Kicks::default());
        let locals: Vec<_> = (0..CPUS).map(|cpu| chip.local(cpu).unwrap()).collect();
        locals.iter().for_each(|local| local.attach(Arc::clone(&kicks) as _));
        kicks.0.store(0, Ordering::Relaxed);
        ChipTwin { clock, chip, ticks, locals, kicks }
    }

    fn set_apic(&self, cpu: usize, register: u64, value: u32) {
        let access = wardian_bus::Access { offset: register << 4, vcpu: cpu };
        self.chip.lapic_device().write(access, &value.to_le_bytes());
        let _ = self.chip.msr_write(cpu, 0x800 + register as u32, value.into());
    }

    fn apic(&self, cpu: usize, register: u64) -> String {
        let mut data = [0; 4];
        let access = wardian_bus::Access { offset: register << 4, vcpu: cpu };
        self.chip.lapic_device().read(access, &mut data);
        format!("{data:x?} {:x?}", self.chip.msr_read(cpu, 0x800 + register as u32))
    }

    fn vcpu(&self, cpu: usize, random: &mut Random) -> String {
        let local = &self.locals[cpu];
        match random.below(8) {
            0 => format!("nmi {}", local.take_nmi()),
            1 => format!("init {}", local.take_init()),
            2 => format!("startup {:?}", local.take_startup()),
            3 => {
                local.set_cr8(random.below(16) as u8);
                String::new()
            }
            _ => {
                let pending = local.pending();
                let vector = if pending.interrupt { local.acknowledge() } else { None };
                if random.once_in(2) {
                    self.set_apic(cpu, 0x0b, 0); // EOI
                }
                format!("{pending:?} {vector:?}")
            }
        }
    }

    fn timer(&self, cpu: usize, random: &mut Random) {
        let mode = random.one_of(&[0, 1 << 17, 2 << 17, 3 << 17, 1 << 16]);
        match random.below(5) {
            0 => self.set_apic(cpu, 0x32, mode | (0x40 + random.below(0x20) as u32)),
            1 => self.set_apic(cpu, 0x38, random.one_of(&[0, 50, 40_000, 3_000_000])),
            2 => self.set_apic(cpu, 0x3e, random.below(12) as u32),
            3 => self.chip.set_tsc_adjust(cpu, random.one_of(&[0, 1000, u64::MAX - 5000])),
            _ => {
                let deadline = self.clock.base.tsc() + random.below(4_000_000);
                let _ = self.chip.msr_write(cpu, TSC_DEADLINE, random.one_of(&[deadline, deadline, 0]));
            }
        }
    }

    fn pic(&self, random: &mut Random) -> String {
        let devices = self.chip.pic_devices();
        let device = &devices[random.below(devices.len() as u64) as usize].1;
        let (offset, mut data) = (random.below(2), [0]);
        match random.below(4) {
            0 => device.read(at(offset), &mut data),
            1 => {
                // A whole initialisation.
                for (offset, value) in
                    [(0, 0x11), (1, 0x20 + random.below(2) as u8 * 8), (1, 4), (1, 1), (1, 0)]
                {
                    device.write(at(offset), &[value]);
                }
            }
            _ => device.write(at(offset), &[random.next() as u8]),
        }
        format!("{data:?}")
    }
}

impl Twin for ChipTwin {
    type State = Chips;

    fn fresh(random: &mut Random) -> ChipTwin {
        let clock = Clock::new();
        let policy =
            random.one_of(&[TickPolicy::LateOne, TickPolicy::Replay, TickPolicy::Sync, TickPolicy::Async]);
        let ticks = TickConfig { policy, align: random.once_in(2) };
        let chip = SoftIrqChip::with_ticks(CPUS, &clock.queue, ticks);
        let this = ChipTwin::with(clock, chip, ticks);
        for cpu in 0..CPUS {
            this.set_apic(cpu, 0x0f, 0x1ff);
            this.set_apic(cpu, 0x0d, 1 << (24 + cpu));
        }
        this
    }

    fn restored(other: &ChipTwin, state: &Chips) -> Result<ChipTwin, Refused> {
        let clock = other.clock.twin();
        let chip = SoftIrqChip::restore(CPUS, &clock.queue, other.ticks, &state.0)?;
        // Whoever holds a line up raises it again.
        for pin in (1..24).filter(|pin| other.chip.save().ioapic.lines >> pin & 1 != 0) {
            chip.set_line(Gsi(pin), true);
        }
        chip.settle_lines();
        Ok(ChipTwin::with(clock, chip, other.ticks))
    }

    fn save(&self) -> Chips {
        self.kicks.0.store(0, Ordering::Relaxed);
        Chips(self.chip.save())
    }

    fn clock(&self) -> &Clock {
        &self.clock
    }

    fn live(&self, random: &mut Random) -> String {
        let cpu = random.below(CPUS as u64) as usize;
        let vector = 0x20 + random.below(0xd0) as u32;
        let seen = match random.below(20) {
            0..4 => self.vcpu(cpu, random),
            4 | 5 => {
                self.timer(cpu, random);
                String::new()
            }
            6 => self.pic(random),
            7..9 => format!("{:?}", self.chip.set_line(Gsi(random.below(26) as u32), random.once_in(2))),
            9 | 10 => {
                let low = random.one_of(&[0u32, 0x100, 0x400, 0x8000, 0x8800, 0x1_0000, 0x500]) | vector;
                let page = self.chip.ioapic_device();
                let pin = random.below(24) as u8;
                for (register, value) in
                    [(0x11 + 2 * pin, (random.below(8) as u32) << 24), (0x10 + 2 * pin, low)]
                {
                    page.write(at(0), &[register]);
                    page.write(at(0x10), &value.to_le_bytes());
                }
                String::new()
            }
            11 => {
                let (dest, logical) = (random.below(8) << 12, random.below(4) << 2);
                let data = vector | random.one_of(&[0, 0x100, 0x400, 0x500, 0xc000]);
                let message = MsiMessage { address: 0xfee0_0000 | dest | logical, data };
                format!("{:?}", self.chip.signal_msi(message))
            }
            12 => {
                let command =
                    random.one_of(&[0u32, 0x800, 0x4_0000, 0x8_0000, 0xc_0000, 0x500, 0x600, 0x400]) | vector;
                self.set_apic(cpu, 0x31, (random.below(4) as u32) << 24);
                self.set_apic(cpu, 0x30, command);
                String::new()
            }
            13 => {
                let base = self.chip.msr_read(cpu, 0x1b).unwrap();
                let mode = random.one_of(&[0xc00, 0x800, 0x800, 0x800, 0]);
                format!("{:?}", self.chip.msr_write(cpu, 0x1b, base & !0xc00 | mode))
            }
            14 => {
                let register = random.one_of(&[0x08, 0x0d, 0x0e, 0x0f, 0x28, 0x33, 0x35, 0x36, 0x37]);
                let value =
                    random.one_of(&[0x1ff, 0x1ff, 0xff00_0000, 0x700, 0x400, random.clone().next() as u32]);
                self.set_apic(cpu, register, value);
                String::new()
            }
            _ => {
                let mut data = [0; 4];
                self.chip.ioapic_device().read(at(0x10), &mut data);
                format!("{} {data:x?}", self.apic(cpu, random.below(0x40)))
            }
        };
        format!("{seen} {}", self.kicks.0.swap(0, Ordering::Relaxed))
    }
}

#[test]
fn restored_chips_live_on() {
    twin::lives_on::<ChipTwin>(400);
    twin::is_not_upset::<ChipTwin>(100);
    let state = twin::golden(|| {
        let mut random = Random::new(2026);
        let one = ChipTwin::fresh(&mut random);
        for _ in 0..200 {
            one.live(&mut random);
            one.clock.run(random.span());
        }
        one.save()
    });
    let clock = Clock::new();
    clock.base.advance(Nanos(state.0.lapics[0].saved_at_ns));
    let chip = SoftIrqChip::restore(CPUS, &clock.queue, TickConfig::default(), &state.0).unwrap();
    assert_eq!(chip.save(), state.0);
}

#[test]
fn impossible_states_are_refused_by_name() {
    let one = ChipTwin::fresh(&mut Random::new(1));
    one.set_apic(0, 0x32, 0x2_0040);
    one.set_apic(0, 0x38, 1_000_000);
    one.set_apic(1, 0x32, 2 << 17 | 0x41);
    one.chip.msr_write(1, TSC_DEADLINE, 5_000_000).unwrap();
    one.clock.run(Nanos(10_000));
    let refusal = |change: fn(&mut IrqChipState)| twin::refusal(&one, |state| change(&mut state.0));
    assert_eq!(refusal(|_| ()), "taken");
    assert_eq!(refusal(|s| s.lapics.truncate(2)), "lapic there are 2, for 3 vCPUs");
    assert_eq!(refusal(|s| s.lapics[1].saved_at_ns += 1), "lapic vCPU 1, saved_at_ns");
    assert_eq!(refusal(|s| s.lapics[1].apic_id = 2), "lapic vCPU 1, apic_id");
    assert_eq!(refusal(|s| s.lapics[1].apic_base |= 0x100), "lapic vCPU 1, apic_base");
    assert_eq!(refusal(|s| s.lapics[1].apic_base = 0xfee0_0400), "lapic vCPU 1, apic_base");
    assert_eq!(refusal(|s| s.lapics[1].apic_base |= 1), "lapic vCPU 1, apic_base");
    assert_eq!(refusal(|s| s.lapics[0].dfr = 0), "lapic vCPU 0, dfr");
    assert_eq!(refusal(|s| s.lapics[0].svr = 0x800), "lapic vCPU 0, svr");
    assert_eq!(refusal(|s| s.lapics[0].isr[0] = 1), "lapic vCPU 0, isr");
    assert_eq!(refusal(|s| s.lapics[0].irr[0] = 0x8000), "lapic vCPU 0, irr");
    assert_eq!(refusal(|s| s.lapics[0].icr = 1 << 12), "lapic vCPU 0, icr");
    assert_eq!(refusal(|s| s.lapics[0].lvt[5] = 0x8000), "lapic vCPU 0, lvt[5]");
    assert_eq!(refusal(|s| s.lapics[0].timer_divide = 4), "lapic vCPU 0, timer_divide");
    assert_eq!(refusal(|s| s.lapics[0].timer_initial = 7), "lapic vCPU 0, timer.run");
    assert_eq!(refusal(|s| s.lapics[0].tsc_deadline = 7), "lapic vCPU 0, tsc_deadline");
    assert_eq!(refusal(|s| s.lapics[1].timer.run = RunState::Stopped), "lapic vCPU 1, tsc_deadline");
    assert_eq!(refusal(|s| s.lapics[1].timer_initial = 1), "lapic vCPU 1, timer_initial");
    assert_eq!(
        refusal(|s| s.lapics[1].timer.counts.stepped = u64::MAX),
        "lapic vCPU 1, timer.counts.stepped"
    );
    assert_eq!(refusal(|s| s.lapics[0].startup = Some(1)), "lapic vCPU 0, startup");
    assert_eq!(refusal(|s| s.lapics[0].waits_for_startup = true), "lapic vCPU 0, waits_for_startup");
    assert_eq!(
        refusal(|s| (s.lapics[1].waits_for_startup, s.lapics[1].startup) = (false, Some(9))),
        "lapic vCPU 1, startup"
    );
    assert_eq!(refusal(|s| s.ioapic.next_arbiter = 3), "ioapic next_arbiter");
    assert_eq!(refusal(|s| s.ioapic.id = 16), "ioapic id");
    assert_eq!(refusal(|s| s.ioapic.lines = 1), "ioapic lines");
    assert_eq!(refusal(|s| s.ioapic.entries[3] = 1 << 40), "ioapic entries[3]");
    assert_eq!(refusal(|s| s.ioapic.entries[3] = 1 << 14), "ioapic entries[3]");
    assert_eq!(refusal(|s| s.pic.master.elcr = 1), "pic master.elcr");
    assert_eq!(refusal(|s| s.pic.slave.vector_base = 1), "pic slave.vector_base");
    assert_eq!(refusal(|s| s.pic.slave.top = 8), "pic slave.top");
    assert_eq!(refusal(|s| (s.pic.slave.elcr, s.pic.slave.irr) = (2, 2)), "pic slave.irr");
    assert_eq!(refusal(|s| s.pic.slave.init = InitState::Icw3), "taken");
}

/// The edge "TSC before TSC deadline" of the order of restore.
#[test]
fn a_deadline_is_not_restored_before_the_counter_that_it_counts_in() {
    let one = ChipTwin::fresh(&mut Random::new(1));
    one.clock.run(Nanos(1_000_000));
    one.set_apic(1, 0x32, 2 << 17 | 0x41);
    one.chip.msr_write(1, TSC_DEADLINE, 5_000_000).unwrap();
    let state = one.chip.save();
    // A counter that begins anew would let the deadline be 4 ms late.
    let early = Clock::new();
    let refused = SoftIrqChip::restore(CPUS, &early.queue, one.ticks, &state).unwrap_err();
    assert!(refused.why.contains("the clock stands at 0 ns: it is restored first"), "{refused}");
    let two = ChipTwin::restored(&one, &Chips(state)).unwrap();
    two.clock.run(Nanos(3_999_999));
    assert!(!two.locals[1].pending().interrupt);
    two.clock.run(Nanos(1));
    assert_eq!((two.locals[1].pending().interrupt, two.locals[1].acknowledge()), (true, Some(0x41)));
}

/// A host that was started anew has another counter.
#[test]
fn a_deadline_in_the_hosts_own_counter_stays_as_far_away() {
    let native = |ticks: u64| {
        let config = TimeConfig { tsc: TscMode::Native, may_lag: false };
        let base = TimeBase::manual_with(Nanos(0), config);
        base.advance(Nanos(ticks));
        base.resume(wardian_time::ResumePolicy::Freeze);
        let queue = TimerQueue::new(Arc::clone(&base));
        Clock { base, queue }
    };
    let clock = native(77_000_000_000);
    let chip = SoftIrqChip::new(1, &clock.queue);
    let one = |register, value| {
        chip.lapic_device().write(at(register), &u32::to_le_bytes(value));
    };
    one(0xf0, 0x1ff);
    one(0x320, 2 << 17 | 0x41);
    chip.msr_write(0, TSC_DEADLINE, clock.base.tsc() + 1_000).unwrap();
    let state = chip.save();
    let clock = native(5);
    let chip = SoftIrqChip::restore(1, &clock.queue, TickConfig::default(), &state).unwrap();
    assert_eq!(chip.msr_read(0, TSC_DEADLINE), Ok(1_005));
    clock.run(Nanos(1_000));
    assert_eq!(chip.local(0).unwrap().acknowledge(), None);
    assert!(chip.local(0).unwrap().pending().interrupt);
}

/// The edge "chips, then devices, then lines".
#[test]
fn a_line_that_is_raised_again_is_no_new_edge_and_one_that_is_not_goes_down() {
    let clock = Clock::new();
    let chip = SoftIrqChip::new(1, &clock.queue);
    chip.lapic_device().write(at(0xf0), &0x1ffu32.to_le_bytes());
    let page = chip.ioapic_device();
    for (pin, low) in [(4u8, 0x34u32), (9, 0x8039)] {
        page.write(at(0), &[0x10 + 2 * pin]);
        page.write(at(0x10), &low.to_le_bytes());
        chip.set_line(Gsi(pin.into()), true);
    }
    let local = chip.local(0).unwrap();
    assert_eq!((local.acknowledge(), local.acknowledge()), (Some(0x39), None));
    let state = chip.save();
    let restore = || SoftIrqChip::restore(1, &clock.queue, TickConfig::default(), &state).unwrap();
    let again = restore();
    again.set_line(Gsi(4), true);
    again.set_line(Gsi(9), true);
    again.settle_lines();
    assert_eq!(again.save(), state);
    let forgotten = restore();
    forgotten.set_line(Gsi(4), true);
    forgotten.settle_lines();
    assert_eq!(forgotten.save().ioapic.lines, 1 << 4);
    assert_eq!(forgotten.save().lapics, state.lapics);
}

#[test]
fn a_tick_from_another_engine_needs_its_time_alone() {
    let state = TickState { run: RunState::Once { at_ns: 500 }, ..TickState::default() };
    let one = ChipTwin::fresh(&mut Random::new(1));
    let mut chips = one.chip.save();
    chips.lapics[2].lvt[0] = 0x55;
    chips.lapics[2].timer_initial = 500;
    chips.lapics[2].timer_divide = 0x0b;
    chips.lapics[2].timer = state;
    let two = ChipTwin::restored(&one, &Chips(chips)).unwrap();
    two.clock.run(Nanos(500));
    assert!(two.locals[2].pending().interrupt);
    assert_eq!(two.locals[2].acknowledge(), Some(0x55));
}
