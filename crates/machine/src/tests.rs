//! The life of a machine with a scripted processor and toy devices.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use wardian_bus::{Access, Bus, Device};
use wardian_chipset::power::{PowerRequest, PowerSink};
use wardian_cpu::{Answer, CpuState, DebugEvent, DebugRequest, EngineError, Exit, Glance, Vcpu};
use wardian_irq::{Delivery, Gsi, IrqChip, Kick, MsiMessage, Quiet};
use wardian_memory::GuestMemory;
use wardian_time::{ResumePolicy, TimeBase, TimerQueue};

use crate::board::{Board, Msrs};
use crate::diary::Diary;
use crate::ending::{End, Ending};
use crate::error::{MachineError, Outcome, status};
use crate::lifecycle::{Begin, Runner};
use crate::operate::Buttons;
use crate::vcpu::Slot;
use crate::vm::{Parts, Vm};

mod operating;

/// What a script does next.
enum Step {
    Exit(Exit),
    /// Computes until kicked, then returns `Interrupted`.
    Compute,
    /// Returns `Halt` until the flag is set, as an engine with nothing pending does.
    HaltUnless(Arc<AtomicBool>),
    Fail,
    Panic,
}

#[derive(Default)]
struct Flag {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Kick for Flag {
    fn kick(&self) {
        *self.set.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

/// A processor that follows a script; after it, it computes.
struct Scripted {
    steps: VecDeque<Step>,
    answers: Arc<Mutex<Vec<Answer>>>,
    kicked: Arc<Flag>,
    state: CpuState,
    resumed: Arc<AtomicUsize>,
}

impl Scripted {
    fn new(steps: Vec<Step>) -> Scripted {
        let mut state = CpuState::reset();
        state.gpr[0] = 0x1234;
        Scripted {
            steps: steps.into(),
            answers: Arc::default(),
            kicked: Arc::default(),
            state,
            resumed: Arc::default(),
        }
    }
}

impl Vcpu for Scripted {
    fn run(&mut self, answer: Answer) -> Result<Exit, EngineError> {
        self.answers.lock().unwrap().push(answer);
        if std::mem::take(&mut *self.kicked.set.lock().unwrap())
            && !matches!(self.steps.front(), Some(Step::HaltUnless(_)))
        {
            return Ok(Exit::Interrupted);
        }
        match self.steps.pop_front() {
            Some(Step::Exit(exit)) => Ok(exit),
            Some(Step::HaltUnless(flag)) => {
                if !flag.load(Ordering::Acquire) {
                    self.steps.push_front(Step::HaltUnless(flag));
                    return Ok(Exit::Halt);
                }
                self.run(Answer::None)
            }
            Some(Step::Fail) => {
                Err(EngineError::Unsupported { vcpu: 0, rip: 0x77, what: "a thing".to_owned() })
            }
            Some(Step::Panic) => panic!("scripted"),
            Some(Step::Compute) | None => {
                let mut set = self.kicked.set.lock().unwrap();
                while !*set {
                    set = self.kicked.changed.wait(set).unwrap();
                }
                *set = false;
                Ok(Exit::Interrupted)
            }
        }
    }
    fn state(&mut self) -> CpuState {
        self.state.clone()
    }
    fn glance(&mut self) -> Glance {
        Glance { rip: self.state.rip, ..Glance::default() }
    }
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kicked) as Arc<dyn Kick>
    }
    fn set_debug(&mut self, _request: &DebugRequest) {}
    fn translate(&mut self, linear: u64) -> Option<u64> {
        Some(linear)
    }
    fn resumed(&mut self) {
        self.resumed.fetch_add(1, Ordering::AcqRel);
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("steps_left", self.steps.len() as u64)]
    }
}

/// Remembers writes, answers reads with `0x1122_3344_5566_7788` and reports the vCPU.
#[derive(Default)]
struct Toy {
    writes: Mutex<Vec<(u64, usize, Vec<u8>)>>,
}

impl Device for Toy {
    fn name(&self) -> &str {
        "toy"
    }
    fn read(&self, _at: Access, data: &mut [u8]) {
        let len = data.len();
        data.copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes()[..len]);
    }
    fn write(&self, at: Access, data: &[u8]) {
        self.writes.lock().unwrap().push((at.offset, at.vcpu, data.to_vec()));
    }
}

/// Turns a byte into a request.
struct PowerPort(Arc<dyn PowerSink>);

impl Device for PowerPort {
    fn name(&self) -> &str {
        "power"
    }
    fn read(&self, _at: Access, _data: &mut [u8]) {}
    fn write(&self, _at: Access, data: &[u8]) {
        self.0.request(match data[0] {
            0 => PowerRequest::PowerOff,
            1 => PowerRequest::Reset,
            code => PowerRequest::DebugExit(code.into()),
        });
    }
}

struct ToyMsrs;

impl Msrs for ToyMsrs {
    fn read(&self, vcpu: usize, index: u32) -> Option<u64> {
        (index == 0x1b).then_some(0xfee0_0900 + vcpu as u64)
    }
    fn write(&self, _vcpu: usize, index: u32, _value: u64) -> bool {
        index == 0x6e0
    }
}

const TOY_PORT: u16 = 0x100;
const POWER_PORT: u16 = 0x200;
const TOY_GPA: u64 = 0xfed0_0000;

fn parts(toy: &Arc<Toy>, ending: &Arc<Ending>, vcpus: Vec<Scripted>, held: bool) -> Parts {
    let power: Arc<dyn PowerSink> = Arc::clone(ending) as _;
    let (mut ports, mut mmio) = (Bus::new(), Bus::new());
    ports.map(TOY_PORT.into()..(TOY_PORT + 8).into(), Arc::clone(toy) as _).unwrap();
    ports.map(POWER_PORT.into()..(POWER_PORT + 1).into(), Arc::new(PowerPort(power))).unwrap();
    mmio.map(TOY_GPA..TOY_GPA + 0x1000, Arc::clone(toy) as _).unwrap();
    Parts {
        name: "test".to_owned(),
        memory: GuestMemory::new(0x10000).unwrap(),
        queue: TimerQueue::new(TimeBase::host()),
        board: Board { ports, mmio, msrs: Arc::new(ToyMsrs) },
        slots: vcpus
            .into_iter()
            .enumerate()
            .map(|(index, vcpu)| Slot::new(index, Box::new(vcpu), Arc::new(Quiet)))
            .collect(),
        workers: Vec::new(),
        keep: Vec::new(),
        held,
        diary: Diary::new(),
        buttons: Arc::new(Buttons {
            power: Box::new({
                let ending = Arc::clone(ending);
                move || PowerSink::request(&*ending, PowerRequest::PowerOff)
            }),
            chip: Arc::new(Wires),
        }),
        on_resume: ResumePolicy::Freeze,
        lockup: Some(Duration::from_secs(20)),
    }
}

/// Interrupt chips that nothing comes through.
struct Wires;

impl IrqChip for Wires {
    fn set_line(&self, _gsi: Gsi, _level: bool) -> Delivery {
        Delivery::Masked
    }
    fn signal_msi(&self, _message: MsiMessage) -> Delivery {
        Delivery::Masked
    }
}

/// A vCPU whose thread has not started.
pub(crate) fn idle_slot() -> Slot {
    Slot::new(0, Box::new(Scripted::new(Vec::new())), Arc::new(Quiet))
}

fn vm(vcpus: Vec<Scripted>) -> (Arc<Vm>, Arc<Ending>) {
    let ending = Ending::new();
    let parts = parts(&Arc::default(), &ending, vcpus, false);
    let vm = Vm::new(parts, Arc::clone(&ending), Arc::new(|_, _| false));
    vm.start().unwrap();
    (vm, ending)
}

/// Runs scripts as lives of one machine: the first element is the first life.
fn run(lives: Vec<Vec<Scripted>>, no_reboot: bool) -> (Outcome, Runner, Arc<Toy>) {
    let (toy, ending) = (Arc::<Toy>::default(), Ending::new());
    let (of_assemble, toy_of_assemble) = (Arc::clone(&ending), Arc::clone(&toy));
    let mut lives = lives.into_iter();
    let assemble = move |held| {
        let vcpus = lives.next().expect("no more lives");
        Ok(parts(&toy_of_assemble, &of_assemble, vcpus, held))
    };
    let mut runner = Runner::new(Box::new(assemble), Begin::default(), no_reboot, ending).unwrap();
    let outcome = runner.run();
    (outcome, runner, toy)
}

fn out(port: u16, data: u32) -> Step {
    Step::Exit(Exit::PortOut { port, size: 1, data })
}

fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("not within 10 s: {what}");
}

#[test]
fn exits_reach_their_device_and_answers_come_back() {
    let vcpu = Scripted::new(vec![
        Step::Exit(Exit::PortIn { port: TOY_PORT, size: 2 }),
        Step::Exit(Exit::PortIn { port: 0x999, size: 4 }),
        Step::Exit(Exit::PortOut { port: TOY_PORT + 3, size: 4, data: 0xaabb_ccdd }),
        Step::Exit(Exit::MmioRead { gpa: TOY_GPA + 8, size: 8 }),
        Step::Exit(Exit::MmioRead { gpa: 0xc000_0000, size: 1 }),
        Step::Exit(Exit::MmioWrite { gpa: TOY_GPA + 16, size: 2, data: 0x1_2345 }),
        Step::Exit(Exit::MsrRead { index: 0x1b }),
        Step::Exit(Exit::MsrRead { index: 0xdead }),
        Step::Exit(Exit::MsrWrite { index: 0x6e0, value: 1 }),
        Step::Exit(Exit::MsrWrite { index: 0x1b, value: 1 }),
        Step::Exit(Exit::Hypercall { number: 1, args: [0; 4] }),
        out(POWER_PORT, 0),
        Step::Fail,
    ]);
    let answers = Arc::clone(&vcpu.answers);
    let (outcome, runner, toy) = run(vec![vec![vcpu]], false);
    assert!(matches!(outcome, Outcome::PowerOff), "{outcome:?}");
    let want = [
        Answer::None,
        Answer::Data(0x7788),
        Answer::Data(0xffff_ffff),
        Answer::None,
        Answer::Data(0x1122_3344_5566_7788),
        Answer::Data(0xff),
        Answer::None,
        Answer::Data(0xfee0_0900),
        Answer::Fault,
        Answer::None,
        Answer::Fault,
        Answer::Data(-1000i64 as u64),
    ];
    assert_eq!(*answers.lock().unwrap(), want, "nothing runs after the power-off");
    let writes = toy.writes.lock().unwrap().clone();
    assert_eq!(writes, [(3, 0, vec![0xdd, 0xcc, 0xbb, 0xaa]), (16, 0, vec![0x45, 0x23])]);
    let stats = runner.control().stats();
    let count = |kind: &str| stats.vcpus[0].exits.iter().find(|e| e.kind == kind).map_or(0, |e| e.count);
    assert_eq!((count("port-in"), count("port-out"), count("mmio-read"), count("msr-write")), (2, 2, 2, 2));
    assert_eq!(stats.vcpus[0].engine["steps_left"], 1);
}

#[test]
fn every_end_has_its_outcome_and_status() {
    let one = |step: Step| run(vec![vec![Scripted::new(vec![step]), Scripted::new(vec![])]], true).0;
    let table = [
        (one(out(POWER_PORT, 0)), status::POWER_OFF),
        (one(out(POWER_PORT, 1)), status::RESET),
        (one(out(POWER_PORT, 3)), 7),
        (one(Step::Exit(Exit::Shutdown)), status::TRIPLE_FAULT),
        (one(Step::Fail), status::ENGINE),
        (one(Step::Panic), status::ENGINE),
    ];
    for (outcome, status) in &table {
        assert_eq!(outcome.status(), *status, "{outcome:?}");
    }
    assert!(matches!(table[2].0, Outcome::DebugExit(3)));
    // The reset state is in real mode at FFFF_FFF0h.
    assert!(matches!(table[3].0, Outcome::TripleFault { vcpu: 0, rip: 0xffff_fff0 }), "{:?}", table[3].0);
    match &table[5].0 {
        Outcome::Failed(MachineError::Panic { thread, message }) => {
            assert_eq!((thread.as_str(), message.as_str()), ("vcpu0", "scripted"));
        }
        other => panic!("{other:?}"),
    }
    let all = [status::POWER_OFF, status::BAD_INPUT, status::RESET, status::TRIPLE_FAULT, status::ENGINE];
    assert!(all.iter().all(|s| s % 2 == 0), "a debug exit is odd");
}

#[test]
fn a_reset_builds_the_machine_anew() {
    let first = vec![Scripted::new(vec![out(POWER_PORT, 1)]), Scripted::new(vec![])];
    let second = vec![Scripted::new(vec![out(TOY_PORT, 9), out(POWER_PORT, 0)]), Scripted::new(vec![])];
    let (outcome, runner, toy) = run(vec![first, second], false);
    assert!(matches!(outcome, Outcome::PowerOff), "{outcome:?}");
    assert_eq!(*toy.writes.lock().unwrap(), [(0, 0, vec![9])]);
    let stats = runner.control().stats();
    assert_eq!(stats.reboots, 1);
    assert_eq!(stats.vcpus[0].exits[0].count, 3, "counters go on over a reset");
}

#[test]
fn a_halted_vcpu_sleeps_until_kicked_and_no_kick_is_lost() {
    // Many rounds of: halted until the flag is raised and kicked, then one port write.
    const ROUNDS: usize = 2000;
    let flags: Vec<Arc<AtomicBool>> = (0..ROUNDS).map(|_| Arc::default()).collect();
    let steps = flags.iter().flat_map(|f| [Step::HaltUnless(Arc::clone(f)), out(TOY_PORT, 1)]).collect();
    let (toy, ending) = (Arc::<Toy>::default(), Ending::new());
    let parts = parts(&toy, &ending, vec![Scripted::new(steps)], false);
    let wake = Arc::clone(&parts.slots[0].wake);
    let vm = Vm::new(parts, Arc::clone(&ending), Arc::new(|_, _| false));
    vm.start().unwrap();
    for (round, flag) in flags.iter().enumerate() {
        flag.store(true, Ordering::Release);
        wake.kick();
        if round % 3 == 0 {
            std::thread::yield_now();
        }
        let written = || toy.writes.lock().unwrap().len() > round;
        let begin = std::time::Instant::now();
        while !written() {
            assert!(begin.elapsed() < Duration::from_secs(10), "wake-up {round} is lost");
            std::hint::spin_loop();
        }
    }
    ending.request(End::Outside);
    vm.finish();
}

#[test]
fn a_pause_is_acknowledged_and_stops_time() {
    let asleep = Arc::new(AtomicBool::new(false));
    let halted = Scripted::new(vec![Step::HaltUnless(asleep)]);
    let computing = Scripted::new(vec![Step::Compute]);
    let busy = Scripted::new((0..200_000).map(|_| out(TOY_PORT, 1)).collect());
    let resumed = Arc::clone(&computing.resumed);
    let (vm, _) = vm(vec![halted, computing, busy]);
    let outer = vm.pause();
    let before = vm.clock().0;
    for index in 0..3 {
        assert!(vm.with_vcpu(index, &mut |vcpu| assert_eq!(vcpu.state().gpr[0], 0x1234)));
    }
    drop(vm.pause());
    assert_eq!(vm.clock().0, before, "time stands still, also after an inner pause");
    assert!(vm.with_vcpu(1, &mut |_| {}));
    drop(outer);
    until("time runs", || vm.clock().0 > before);
    assert_eq!(resumed.load(Ordering::Acquire), 2, "told at the start and once that the machine was stopped");
    assert!(!vm.with_vcpu(1, &mut |_| {}), "a running vCPU cannot be looked at");
    vm.finish();
}

#[test]
fn a_pause_completes_the_answer_first() {
    let vcpu =
        Scripted::new((0..1000).map(|_| Step::Exit(Exit::PortIn { port: TOY_PORT, size: 1 })).collect());
    let answers = Arc::clone(&vcpu.answers);
    let (vm, _) = vm(vec![vcpu]);
    for _ in 0..50 {
        let paused = vm.pause();
        let seen = answers.lock().unwrap().clone();
        let stats = vm.with_vcpu(0, &mut |vcpu| {
            // Every read that was asked for has been answered.
            let asked = 1000 - vcpu.counters()[0].1;
            let answered = seen.iter().filter(|a| **a == Answer::Data(0x88)).count() as u64;
            assert_eq!(asked, answered);
        });
        assert!(stats);
        drop(paused);
    }
    vm.finish();
}

#[test]
fn the_debugger_holds_steps_and_releases() {
    let step = || Step::Exit(Exit::Debug(DebugEvent::Step));
    let (toy, ending) = (Arc::<Toy>::default(), Ending::new());
    let parts = parts(
        &toy,
        &ending,
        vec![Scripted::new(vec![step(), out(TOY_PORT, 5), step()]), Scripted::new(vec![])],
        true,
    );
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (of_hook, cared) = (Arc::clone(&seen), Arc::new(AtomicBool::new(true)));
    let of_hook_cared = Arc::clone(&cared);
    let hook = move |index, event| {
        of_hook.lock().unwrap().push((index, event));
        of_hook_cared.load(Ordering::Acquire)
    };
    let vm = Vm::new(parts, Arc::clone(&ending), Arc::new(hook));
    vm.start().unwrap();
    vm.hold();
    assert_eq!(vm.clock().0, 0, "a machine that waits for its debugger has not begun");
    assert!(seen.lock().unwrap().is_empty());
    vm.release(&|index| index == 0);
    until("the step", || !seen.lock().unwrap().is_empty());
    assert!(vm.with_vcpu(0, &mut |_| {}), "a vCPU that met the debugger is parked");
    assert!(vm.with_vcpu(1, &mut |_| {}), "the other was never let go");
    assert!(toy.writes.lock().unwrap().is_empty());
    cared.store(false, Ordering::Release);
    vm.release(&|_| true);
    until("the second step, which nobody takes care of", || seen.lock().unwrap().len() == 2);
    until("both run", || !vm.with_vcpu(0, &mut |_| {}) && !vm.with_vcpu(1, &mut |_| {}));
    assert_eq!(toy.writes.lock().unwrap().len(), 1);
    vm.finish();
}

#[test]
fn the_end_comes_while_held() {
    let ending = Ending::new();
    let parts = parts(&Arc::default(), &ending, vec![Scripted::new(vec![]), Scripted::new(vec![])], true);
    let vm = Vm::new(parts, Arc::clone(&ending), Arc::new(|_, _| false));
    vm.start().unwrap();
    ending.request(End::Outside);
    ending.request(End::Power(PowerRequest::PowerOff));
    ending.wait();
    vm.finish();
    vm.hold(); // nobody is left to acknowledge: returns
    assert!(matches!(ending.take(), Some(End::Outside)), "the first request counts");
    assert!(ending.take().is_none());
}

#[test]
fn an_end_from_outside_is_not_lost_to_a_reset() {
    let ending = Ending::new();
    ending.request(End::Power(PowerRequest::Reset));
    ending.request(End::Outside);
    assert!(matches!(ending.take(), Some(End::Outside)));
    ending.request(End::Power(PowerRequest::PowerOff));
    ending.request(End::Outside);
    assert!(matches!(ending.take(), Some(End::Power(PowerRequest::PowerOff))));
    ending.request(End::Power(PowerRequest::Reset));
    assert!(matches!(ending.take(), Some(End::Power(PowerRequest::Reset))));
}
