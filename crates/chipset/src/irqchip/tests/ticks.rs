//! Ticks of every timer through the whole chip, under every policy.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use wardian_bus::Device;
use wardian_irq::{IrqChip, Kick, Line, LocalInterrupts};
use wardian_time::{Nanos, ResumePolicy, TickConfig, TickPolicy, TimeBase, TimeConfig, TimerQueue};

use super::super::SoftIrqChip;
use crate::hpet::{Hpet, LegacyRouting};
use crate::layout::{GSI_HPET, GSI_RTC, GSI_TIMER};
use crate::pit::Pit;
use crate::rtc::{MemorySize, Rtc};
use crate::testing::{at, read};

const MS: u64 = 1_000_000;

/// A vCPU that is halted or not, as the test says.
#[derive(Default)]
struct Cpu(AtomicBool);
impl Kick for Cpu {
    fn kick(&self) {}
    fn slept_at(&self, _point: Nanos) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timer {
    PitByIoapic,
    PitByPic,
    Rtc,
    HpetEdge,
    HpetLevel,
    Lapic,
}
use Timer::{HpetEdge, HpetLevel, Lapic, PitByIoapic, PitByPic};

const TIMERS: [Timer; 6] = [PitByIoapic, PitByPic, Timer::Rtc, HpetEdge, HpetLevel, Lapic];

struct Rig {
    base: Arc<TimeBase>,
    queue: Arc<TimerQueue>,
    chip: Arc<SoftIrqChip>,
    local: Arc<dyn LocalInterrupts>,
    cpu: Arc<Cpu>,
    rtc: Arc<Rtc>,
    hpet: Arc<Hpet>,
    timer: Timer,
    /// What keeps the timer alive.
    _pit: Arc<Pit>,
}

impl Rig {
    /// One vCPU and all timers, of which `timer` ticks every 10 ms (the RTC: 1/128 s) as vector 40h.
    fn new(timer: Timer, policy: TickPolicy) -> Rig {
        let may_lag = policy == TickPolicy::Delay;
        let base = TimeBase::manual_with(Nanos(0), TimeConfig { may_lag, ..TimeConfig::default() });
        base.resume(ResumePolicy::Freeze);
        let queue = TimerQueue::new(Arc::clone(&base));
        let ticks = TickConfig { policy, align: false };
        let chip = SoftIrqChip::with_ticks(1, &queue, ticks);
        let irqs = Arc::clone(&chip) as Arc<dyn IrqChip>;
        let routing = LegacyRouting::default();
        let pit = Pit::new(&queue, routing.gate(Line::new(Arc::clone(&irqs), GSI_TIMER)), ticks);
        let memory = MemorySize::default();
        let rtc = Rtc::new(&queue, Line::new(Arc::clone(&irqs), GSI_RTC), memory, routing.clone(), ticks);
        let hpet = Hpet::new(&queue, &irqs, routing, ticks);
        let local = chip.local(0).unwrap();
        let cpu = Arc::new(Cpu::default());
        local.attach(cpu.clone());
        let rig = Rig { base, queue, chip, local, cpu, rtc, hpet, timer, _pit: pit.clone() };
        rig.lapic(0xf0, 0x1ff);
        match timer {
            PitByIoapic | PitByPic => {
                if timer == PitByPic {
                    let ports = rig.chip.pic_devices();
                    let put = |port: u64, value: u8| {
                        let (range, device) = ports.iter().find(|(range, _)| range.contains(&port)).unwrap();
                        device.write(at(port - range.start), &[value]);
                    };
                    for (port, value) in
                        [(0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 1), (0x21, 0xfe), (0xa1, 0xff)]
                    {
                        put(port, value);
                    }
                } else {
                    rig.route(2, 0x40);
                }
                pit.write(at(3), &[0x34]);
                pit.write(at(0), &[(11_932u16 & 0xff) as u8]);
                pit.write(at(0), &[(11_932u16 >> 8) as u8]);
            }
            Timer::Rtc => {
                rig.route(8, 0x40);
                rig.cmos(0x0a, 0x29); // 128 Hz
                rig.cmos(0x0b, 0x42);
            }
            HpetEdge | HpetLevel => {
                let level = u64::from(timer == HpetLevel) << 1;
                rig.route(GSI_HPET[0].0, 0x40 | level << 14);
                rig.hpet(0x10, 1);
                rig.hpet(0x100, u64::from(GSI_HPET[0].0) << 9 | 0x4c | level);
                rig.hpet(0x108, MS);
                rig.hpet(0x108, MS); // 10 ms of 10 ns
            }
            Lapic => {
                rig.lapic(0x3e0, 11);
                rig.lapic(0x320, 0x2_0040);
                rig.lapic(0x380, 10 * MS as u32);
            }
        }
        rig
    }

    fn lapic(&self, offset: u64, value: u32) {
        self.chip.lapic_device().write(at(offset), &value.to_le_bytes());
    }

    fn hpet(&self, offset: u64, value: u64) {
        self.hpet.write(at(offset), &value.to_le_bytes());
    }

    fn cmos(&self, register: u8, value: u8) {
        self.rtc.write(at(0), &[register]);
        self.rtc.write(at(1), &[value]);
    }

    fn route(&self, pin: u32, entry: u64) {
        let ioapic = self.chip.ioapic_device();
        for (index, half) in [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry & 0xffff_ffff)] {
            ioapic.write(at(0), &index.to_le_bytes());
            ioapic.write(at(0x10), &(half as u32).to_le_bytes());
        }
    }

    /// Time passes while the vCPU does not run, though the timer thread does.
    fn pass(&self, ms: u64) {
        for _ in 0..ms * 10 {
            self.base.advance(Nanos(MS / 10));
            self.queue.run_due();
        }
    }

    /// The vCPU runs and takes what there is: how many interrupts.
    fn take(&self) -> usize {
        let mut count = 0;
        while self.local.pending().interrupt {
            let vector = self.local.acknowledge().unwrap();
            assert_eq!(vector, 0x40);
            count += 1;
            match self.timer {
                Timer::Rtc => {
                    self.rtc.write(at(0), &[0x0c]);
                    assert_ne!(read::<1>(&*self.rtc, 1)[0] & 0x40, 0);
                }
                HpetLevel => self.hpet(0x20, 1),
                _ => {}
            }
            if self.timer == PitByPic {
                self.chip.pic_devices()[0].1.write(at(0), &[0x20]);
            } else {
                self.lapic(0xb0, 0);
            }
            assert!(count < 1000, "{:?}: no end", self.timer);
        }
        count
    }

    /// Time passes while the vCPU runs all along.
    fn run(&self, ms: u64) -> usize {
        // In steps that no policy calls late.
        (0..ms * 25)
            .map(|_| {
                self.base.advance(Nanos(MS / 25));
                self.queue.run_due();
                self.take()
            })
            .sum()
    }
}

#[test]
fn on_time_each_timer_ticks_at_its_rate() {
    for timer in TIMERS {
        for policy in TickPolicy::ALL {
            let rig = Rig::new(timer, policy);
            let expected = if timer == Timer::Rtc { 128 } else { 100 };
            let ticks = rig.run(1000);
            // 11932 periods of the PIT's clock are a little more than 10 ms.
            assert!((expected - 1..=expected).contains(&ticks), "{timer:?} {policy}: {ticks}");
        }
    }
}

#[test]
fn after_a_gap_each_timer_does_as_its_policy_says() {
    for timer in TIMERS {
        let gap = if timer == Timer::Rtc { 44 } else { 55 }; // five points
        for policy in TickPolicy::ALL {
            let rig = Rig::new(timer, policy);
            rig.run(3);
            rig.pass(gap - 3);
            let at_once = rig.take();
            let expected = match policy {
                TickPolicy::Delay | TickPolicy::Replay => 5,
                TickPolicy::Sync => 0,
                _ => 1,
            };
            assert_eq!(at_once, expected, "{timer:?} {policy}");
            // The point of the grid that comes next, and what is still owed.
            let owed = if policy == TickPolicy::ReplaySlew { 4 } else { 0 };
            let period = if timer == Timer::Rtc { 10 } else { 11 };
            assert_eq!(rig.run(period), owed + 1, "{timer:?} {policy}");
        }
    }
}

#[test]
fn a_tick_that_wakes_a_halted_vcpu_comes_under_every_policy() {
    for timer in TIMERS {
        for policy in TickPolicy::ALL {
            let rig = Rig::new(timer, policy);
            rig.cpu.0.store(true, Ordering::Relaxed);
            rig.pass(13);
            rig.cpu.0.store(false, Ordering::Relaxed);
            assert_eq!(rig.take(), 1, "{timer:?} {policy}");
        }
    }
}

#[test]
fn delayed_guest_time_is_that_of_the_tick_and_then_catches_up() {
    for timer in [PitByIoapic, PitByPic, HpetEdge, Lapic] {
        let rig = Rig::new(timer, TickPolicy::Delay);
        rig.run(3);
        rig.pass(52);
        let mut times = Vec::new();
        while rig.local.pending().interrupt {
            times.push(rig.base.now().0 / (MS / 10));
            rig.local.acknowledge();
            if timer == PitByPic {
                rig.chip.pic_devices()[0].1.write(at(0), &[0x20]);
            } else {
                rig.lapic(0xb0, 0);
            }
        }
        assert_eq!(times, [100, 200, 300, 400, 500], "{timer:?}, in 0.1 ms");
        rig.run(10);
        assert!(rig.base.lag() < Nanos(MS / 10), "{timer:?}: within the step of this test");
    }
}

#[test]
fn unmasking_lets_a_suspended_timer_go_on() {
    for policy in [TickPolicy::Replay, TickPolicy::LateOne] {
        let rig = Rig::new(PitByIoapic, policy);
        rig.route(2, 0x1_0040);
        rig.run(35);
        assert_eq!(rig.queue.next_deadline(), None, "{policy}: a masked timer wakes nobody");
        rig.route(2, 0x40);
        let at_once = rig.take();
        assert_eq!(at_once, if policy == TickPolicy::Replay { 3 } else { 0 }, "{policy}");
        assert_eq!(rig.run(10), 1, "{policy}");
    }
}

#[test]
fn a_controller_that_forgets_an_interrupt_does_not_stop_the_timer() {
    let rig = Rig::new(PitByPic, TickPolicy::Replay);
    rig.pass(11);
    assert!(rig.local.pending().interrupt);
    // The guest initializes the pair anew before it takes the interrupt.
    let pic = &rig.chip.pic_devices()[0].1;
    for (port, value) in [(0, 0x11), (1, 0x40), (1, 4), (1, 1), (1, 0xfe)] {
        pic.write(at(port), &[value]);
    }
    assert_eq!(rig.take(), 0);
    assert!(rig.run(1100) > 100, "it comes again");
}
