//! One debugger's session: `gdbstub`'s state machine driven by bytes and stop events.

use std::collections::VecDeque;
use std::io::Write;
use std::ops::Range;
use std::sync::mpsc::Receiver;

use gdbstub::common::{Signal, Tid};
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine as Machine;
use gdbstub::stub::{DisconnectReason, GdbStubBuilder, MultiThreadStopReason};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadRangeStepping, MultiThreadRangeSteppingOps, MultiThreadResume,
    MultiThreadResumeOps, MultiThreadSchedulerLocking, MultiThreadSchedulerLockingOps, MultiThreadSingleStep,
    MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{self, TargetError, TargetResult};
use wardian_cpu::{CpuState, DebugEvent, DebugRequest, Vcpu};
use wardian_memory::{Gpa, PAGE_SIZE};

use crate::Target;
use crate::arch::{Block, Register, X86};
use crate::registers;

/// Largest packet that we take.
const PACKET: usize = 16 * 1024;

/// What a session waits for.
#[derive(Debug)]
pub(crate) enum Event {
    /// The debugger sent this.
    Bytes(Vec<u8>),
    /// The debugger hung up.
    Closed,
    /// vCPU `.0` has parked itself.
    Stopped(usize, DebugEvent),
    /// The machine was built anew; its vCPUs are parked.
    Rebuilt,
    /// The machine has ended with this status.
    Ended(u8),
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Detached,
    Killed,
    HungUp,
    MachineEnded,
}

/// The debugger's side of the socket, with answers gathered into one write each.
pub(crate) struct Wire<W: Write> {
    to: W,
    out: Vec<u8>,
}

impl<W: Write> Connection for Wire<W> {
    type Error = std::io::Error;

    fn write(&mut self, byte: u8) -> Result<(), std::io::Error> {
        self.out.push(byte);
        if self.out.len() >= PACKET { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), std::io::Error> {
        let sent = self.to.write_all(&self.out);
        self.out.clear();
        sent?;
        self.to.flush()
    }
}

/// What one vCPU does at the next resume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Plan {
    /// Nothing said: goes on, unless the others are locked.
    #[default]
    Unsaid,
    Continue,
    Step,
    /// Steps as long as RIP stays in the range.
    StepIn(Range<u64>),
}

/// What stands between the protocol and the machine.
pub(crate) struct Session<'a> {
    target: &'a dyn Target,
    breakpoints: Vec<u64>,
    watchpoints: Vec<(u64, u64, WatchKind)>,
    plans: Vec<Plan>,
    lock_others: bool,
    /// The protocol has asked to resume; done once the state machine agrees that we run.
    resume_wanted: bool,
    /// Watchpoints that were hit while the machine was stopping for another reason.
    late: VecDeque<(usize, DebugEvent)>,
    /// The vCPU that the debugger was last told about.
    current: usize,
}

fn tid(index: usize) -> Tid {
    Tid::MIN.saturating_add(index)
}

fn trap(index: usize) -> MultiThreadStopReason<u64> {
    MultiThreadStopReason::SignalWithThread { tid: tid(index), signal: Signal::SIGTRAP }
}

impl<'a> Session<'a> {
    fn new(target: &'a dyn Target) -> Session<'a> {
        Session {
            target,
            breakpoints: Vec::new(),
            watchpoints: Vec::new(),
            plans: vec![Plan::Unsaid; target.vcpus()],
            lock_others: false,
            resume_wanted: false,
            late: VecDeque::new(),
            current: 0,
        }
    }

    fn vcpu<R>(&self, tid: Tid, mut f: impl FnMut(&mut dyn Vcpu) -> R) -> TargetResult<R, Self> {
        let mut out = None;
        self.target.with_vcpu(tid.get() - 1, &mut |vcpu| out = Some(f(vcpu)));
        out.ok_or(TargetError::NonFatal)
    }

    fn change(&self, tid: Tid, mut f: impl FnMut(&mut CpuState) -> Option<()>) -> TargetResult<(), Self> {
        self.vcpu(tid, |vcpu| {
            let mut state = vcpu.state();
            f(&mut state)?;
            vcpu.set_state(&state).ok()
        })?
        .ok_or(TargetError::NonFatal)
    }

    fn steps(&self, index: usize) -> bool {
        matches!(self.plans.get(index), Some(Plan::Step | Plan::StepIn(_)))
    }

    fn request(&self, index: usize) -> DebugRequest {
        let watch = |&(start, len, kind): &(u64, u64, WatchKind)| {
            (start, len, kind != WatchKind::Write, kind != WatchKind::Read)
        };
        DebugRequest {
            single_step: self.steps(index),
            breakpoints: self.breakpoints.clone(),
            watchpoints: self.watchpoints.iter().map(watch).collect(),
        }
    }

    /// Does what the protocol asked for.
    fn go(&mut self) {
        self.resume_wanted = false;
        let locked = self.lock_others;
        let run: Vec<bool> = self.plans.iter().map(|plan| !locked || *plan != Plan::Unsaid).collect();
        for (index, run) in run.iter().enumerate() {
            if *run {
                let request = self.request(index);
                self.target.with_vcpu(index, &mut |vcpu| vcpu.set_debug(&request));
            }
        }
        self.target.resume(&run);
    }

    /// Which watchpoint an access to `at` means: the debugger wants its kind.
    fn watch_kind(&self, at: u64) -> Option<WatchKind> {
        let hit = |(start, len, _): &&(u64, u64, WatchKind)| at.wrapping_sub(*start) < *len;
        self.watchpoints.iter().find(hit).map(|(_, _, kind)| *kind)
    }

    /// What to tell the debugger of a stop; `None` when the vCPU simply goes on.
    fn reason(&mut self, index: usize, event: DebugEvent) -> Option<MultiThreadStopReason<u64>> {
        match event {
            DebugEvent::Step => {
                if let Some(Plan::StepIn(range)) = self.plans.get(index) {
                    let mut rip = None;
                    self.target.with_vcpu(index, &mut |vcpu| rip = Some(vcpu.state().rip));
                    if rip.is_some_and(|rip| range.contains(&rip)) {
                        return None;
                    }
                }
                Some(trap(index))
            }
            DebugEvent::Breakpoint(_) => Some(MultiThreadStopReason::SwBreak(tid(index))),
            DebugEvent::Watchpoint(addr) => Some(match self.watch_kind(addr) {
                Some(kind) => MultiThreadStopReason::Watch { tid: tid(index), kind, addr },
                None => trap(index),
            }),
        }
    }

    /// A vCPU has parked itself while the machine ran.
    fn stopped(&mut self, index: usize, event: DebugEvent) -> Option<MultiThreadStopReason<u64>> {
        let Some(reason) = self.reason(index, event) else {
            let mut only = vec![false; self.plans.len()];
            if let Some(run) = only.get_mut(index) {
                *run = true;
            }
            self.target.resume(&only);
            return None;
        };
        self.target.stop();
        self.current = index;
        Some(reason)
    }

    /// Removes every trace of the debugger from the vCPUs and lets them all go on.
    fn release(&self) {
        self.target.stop();
        for index in 0..self.target.vcpus() {
            self.target.with_vcpu(index, &mut |vcpu| vcpu.set_debug(&DebugRequest::default()));
        }
        self.target.resume(&vec![true; self.target.vcpus()]);
    }

    /// RAM at linear `addr`, up to the end of its page: physical address and length.
    fn translate(&self, addr: u64, len: usize, tid: Tid) -> TargetResult<Option<(Gpa, usize)>, Self> {
        let room = (PAGE_SIZE - addr % PAGE_SIZE) as usize;
        let physical = self.vcpu(tid, |vcpu| vcpu.translate(addr))?;
        Ok(physical.map(|at| (Gpa(at), len.min(room))))
    }
}

/// Serves one debugger from its first byte to the end of its session; the machine runs afterwards,
/// unless it has ended.
pub(crate) fn serve(target: &dyn Target, events: &Receiver<Event>, to: impl Write) -> Result<End, String> {
    let mut session = Session::new(target);
    target.stop();
    let end = drive(&mut session, events, Wire { to, out: Vec::new() });
    match end {
        Ok(End::Killed) => target.kill(),
        Ok(End::MachineEnded) => {}
        _ => session.release(),
    }
    end
}

fn drive<W: Write>(
    session: &mut Session<'_>,
    events: &Receiver<Event>,
    wire: Wire<W>,
) -> Result<End, String> {
    let mut buffer = vec![0; PACKET];
    let stub = GdbStubBuilder::new(wire).with_packet_buffer(&mut buffer).build();
    let stub = stub.map_err(|e| e.to_string())?;
    let mut machine = stub.run_state_machine(session).map_err(|e| e.to_string())?;
    let mut bytes = VecDeque::new();
    let mut ended = false;
    loop {
        machine = match machine {
            Machine::Disconnected(inner) => {
                return Ok(match inner.get_reason() {
                    DisconnectReason::Disconnect => End::Detached,
                    DisconnectReason::Kill => End::Killed,
                    DisconnectReason::TargetExited(_) | DisconnectReason::TargetTerminated(_) => {
                        End::MachineEnded
                    }
                });
            }
            Machine::CtrlCInterrupt(inner) => {
                session.target.stop();
                let reason = MultiThreadStopReason::SignalWithThread {
                    tid: tid(session.current),
                    signal: Signal::SIGINT,
                };
                inner.interrupt_handled(session, Some(reason)).map_err(|e| e.to_string())?
            }
            Machine::Idle(mut inner) => {
                session.resume_wanted = false;
                let Some(byte) = bytes.pop_front() else {
                    inner.borrow_conn().flush().map_err(|e| e.to_string())?;
                    match events.recv() {
                        Ok(Event::Bytes(more)) => bytes.extend(more),
                        Ok(Event::Stopped(index, event @ DebugEvent::Watchpoint(_))) => {
                            session.late.push_back((index, event));
                        }
                        // The vCPU has not left the breakpoint: it meets it again when it goes on.
                        Ok(Event::Stopped(..) | Event::Rebuilt) => {}
                        Ok(Event::Ended(_)) => ended = true,
                        Ok(Event::Closed) | Err(_) => return Ok(End::HungUp),
                    }
                    if ended {
                        return Ok(End::MachineEnded);
                    }
                    machine = Machine::Idle(inner);
                    continue;
                };
                inner.incoming_data(session, byte).map_err(|e| e.to_string())?
            }
            Machine::Running(mut inner) => {
                if session.resume_wanted {
                    if let Some((index, event)) = session.late.pop_front()
                        && let Some(reason) = session.reason(index, event)
                    {
                        session.resume_wanted = false;
                        session.current = index;
                        machine = inner.report_stop(session, reason).map_err(|e| e.to_string())?;
                        continue;
                    }
                    session.go();
                }
                if let Some(byte) = bytes.pop_front() {
                    machine = inner.incoming_data(session, byte).map_err(|e| e.to_string())?;
                    continue;
                }
                inner.borrow_conn().flush().map_err(|e| e.to_string())?;
                match events.recv() {
                    Ok(Event::Bytes(more)) => {
                        bytes.extend(more);
                        inner.into()
                    }
                    Ok(Event::Stopped(index, event)) => match session.stopped(index, event) {
                        Some(reason) => inner.report_stop(session, reason).map_err(|e| e.to_string())?,
                        None => inner.into(),
                    },
                    Ok(Event::Rebuilt) => {
                        session.plans.fill(Plan::Unsaid);
                        session.lock_others = false;
                        session.go();
                        inner.into()
                    }
                    Ok(Event::Ended(status)) => inner
                        .report_stop(session, MultiThreadStopReason::Exited(status))
                        .map_err(|e| e.to_string())?,
                    Ok(Event::Closed) | Err(_) => return Ok(End::HungUp),
                }
            }
        };
    }
}

impl target::Target for Session<'_> {
    type Arch = X86;
    type Error = std::convert::Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Session<'_> {
    fn read_registers(&mut self, regs: &mut Block, tid: Tid) -> TargetResult<(), Self> {
        self.vcpu(tid, |vcpu| regs.load(&vcpu.state()))
    }

    fn write_registers(&mut self, regs: &Block, tid: Tid) -> TargetResult<(), Self> {
        self.change(tid, |state| regs.store(state))
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let memory = self.target.memory().ok_or(TargetError::NonFatal)?;
        let mut done = 0;
        while done < data.len() {
            let Some(addr) = start.checked_add(done as u64) else { break };
            let Some((gpa, len)) = self.translate(addr, data.len() - done, tid)? else { break };
            if memory.read(gpa, &mut data[done..done + len]).is_err() {
                break;
            }
            done += len;
        }
        if done == 0 && !data.is_empty() { Err(TargetError::NonFatal) } else { Ok(done) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let memory = self.target.memory().ok_or(TargetError::NonFatal)?;
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < data.len() {
            let addr = start.checked_add(done as u64).ok_or(TargetError::NonFatal)?;
            let (gpa, len) = self.translate(addr, data.len() - done, tid)?.ok_or(TargetError::NonFatal)?;
            if !memory.contains(gpa, len as u64) {
                return Err(TargetError::NonFatal);
            }
            pieces.push((gpa, done..done + len));
            done += len;
        }
        for (gpa, piece) in pieces {
            memory.write(gpa, &data[piece]).map_err(|_| TargetError::NonFatal)?;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Self::Error> {
        (0..self.target.vcpus()).for_each(|index| thread_is_active(tid(index)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Session<'_> {
    fn read_register(&mut self, tid: Tid, reg_id: Register, buf: &mut [u8]) -> TargetResult<usize, Self> {
        self.vcpu(tid, |vcpu| registers::read(&vcpu.state(), reg_id.0, buf))
    }

    fn write_register(&mut self, tid: Tid, reg_id: Register, val: &[u8]) -> TargetResult<(), Self> {
        self.change(tid, |state| registers::write(state, reg_id.0, val))
    }
}

impl ThreadExtraInfo for Session<'_> {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Self::Error> {
        let text = self.target.describe(tid.get() - 1);
        let len = text.len().min(buf.len());
        buf[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl MultiThreadResume for Session<'_> {
    fn resume(&mut self) -> Result<(), Self::Error> {
        self.resume_wanted = true;
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Self::Error> {
        self.plans.fill(Plan::Unsaid);
        self.lock_others = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Self::Error> {
        self.plan(tid, Plan::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl Session<'_> {
    /// The first action that names a thread counts.
    fn plan(&mut self, tid: Tid, plan: Plan) {
        if let Some(slot @ Plan::Unsaid) = self.plans.get_mut(tid.get() - 1) {
            *slot = plan;
        }
    }

    fn add_breakpoint(&mut self, addr: u64) -> bool {
        if !self.breakpoints.contains(&addr) {
            self.breakpoints.push(addr);
        }
        true
    }

    fn remove_breakpoint(&mut self, addr: u64) -> bool {
        self.breakpoints.retain(|at| *at != addr);
        true
    }
}

impl MultiThreadSingleStep for Session<'_> {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Self::Error> {
        self.plan(tid, Plan::Step);
        Ok(())
    }
}

impl MultiThreadRangeStepping for Session<'_> {
    fn set_resume_action_range_step(&mut self, tid: Tid, start: u64, end: u64) -> Result<(), Self::Error> {
        self.plan(tid, Plan::StepIn(start..end));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Session<'_> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Self::Error> {
        self.lock_others = true;
        Ok(())
    }
}

impl Breakpoints for Session<'_> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Session<'_> {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.add_breakpoint(addr))
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_breakpoint(addr))
    }
}

impl HwBreakpoint for Session<'_> {
    fn add_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.add_breakpoint(addr))
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_breakpoint(addr))
    }
}

impl HwWatchpoint for Session<'_> {
    fn add_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.watchpoints.push((addr, len, kind));
        Ok(len > 0)
    }

    fn remove_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        self.watchpoints.retain(|watch| *watch != (addr, len, kind));
        Ok(true)
    }
}
