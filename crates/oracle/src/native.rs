//! [`Native`]: runs cases on the host's own processor, in this process.
//!
//! Three areas are mapped at fixed addresses: the data window, the code slots, and a frame with a trampoline that
//! loads every register, jumps to the case, and stores every register when it comes back by a jump or, through the
//! signal handler, by an exception.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use iced_x86::code_asm::{
    CodeAssembler, byte_ptr, ds, dword_ptr, eax, ecx, edx, es, fs, gs, ptr, qword_ptr, r8, r9, r10, r11, r12,
    r13, r14, r15, rax, rbp, rbx, rcx, rdi, rdx, rsi, rsp, word_ptr,
};

use crate::case::{
    CODE, CODE_BYTES, Case, DATA, DATA_PAGES, Fault, Outcome, READ_ONLY, State, WINDOW, WideLayout, XSAVE,
    plain_null,
};

/// The frame: registers in, registers out, a small stack, the trampoline.
const FRAME: u64 = 0x3980_0000;
const FRAME_BYTES: usize = 0x10000;
const TRAMPOLINE: u64 = 0x3990_0000;
const IN: u64 = FRAME;
const OUT: u64 = FRAME + 0x200;
const HOST: u64 = FRAME + 0x400;
const FAULT: u64 = FRAME + 0x500;
const TARGET: u64 = FRAME + 0x800;
const TARGET_SELECTOR: u64 = FRAME + 0x808;
const STACK: u64 = FRAME + 0x1000;
const XSAVE_IN: u64 = FRAME + 0x2000;
const XSAVE_OUT: u64 = FRAME + 0x4000;
const XSAVE_ZERO: u64 = FRAME + 0x8000;
/// Offsets within a register block: 16 general registers, then these.
const RFLAGS: u64 = 128;
const FS: u64 = 136;
const GS: u64 = 144;
/// ES, DS, FS, GS.
const SELECTORS: u64 = 152;
/// Offsets within the fault block.
const ACTIVE: u64 = 0;
const VECTOR: u64 = 8;
const ERROR: u64 = 16;
const ADDRESS: u64 = 24;
const RIP: u64 = 32;
const TAKEN_FLAGS: u64 = 40;
const FINISH: u64 = 48;
/// Handlers that were there before, by signal number.
const OLDER: u64 = 0x100;

/// CS of 64-bit and of compatibility-mode user code in Linux.
const USER64: u64 = 0x33;
const USER32: u64 = 0x23;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Why the host cannot be the oracle.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// Another one exists in this process.
    #[error("Only one native runner can exist at a time")]
    Taken,
    /// Memory could not be had at its address.
    #[error("Could not map {bytes} bytes at {address:#x}: {source}")]
    Map {
        /// Address.
        address: u64,
        /// Length.
        bytes: usize,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The trampoline could not be assembled or the host lacks what it needs.
    #[error("The host cannot run native cases: {0}")]
    Host(String),
}

/// The native runner. Belongs to the thread that made it.
pub struct Native {
    xcr0: u64,
    finish: u64,
    not_send: std::marker::PhantomData<*mut u8>,
}

fn map(address: u64, bytes: usize, protection: i32) -> Result<(), NativeError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    // SAFETY: a new mapping at an address that must be free (NOREPLACE); nothing else is affected.
    let got = unsafe { libc::mmap(address as *mut libc::c_void, bytes, protection, flags, -1, 0) };
    if got as u64 == address {
        return Ok(());
    }
    Err(NativeError::Map { address, bytes, source: std::io::Error::last_os_error() })
}

fn protect(address: u64, bytes: usize, protection: i32) {
    // SAFETY: only called for areas that `Native::new` mapped and only this module uses.
    let done = unsafe { libc::mprotect(address as *mut libc::c_void, bytes, protection) };
    assert_eq!(done, 0, "mprotect: {}", std::io::Error::last_os_error());
}

/// Comes back by a jump behind its last byte, not by a breakpoint.
fn goes_straight(case: &Case) -> bool {
    case.bitness == 64 && !case.jumps
}

/// Puts the segment that compatibility-mode cases use as FS and GS at entry 12 of the thread's GDT.
fn set_tls_descriptor() -> Result<(), NativeError> {
    // struct user_desc: entry, base, limit, then seg_32bit and limit_in_pages; below 4 GiB for the 32-bit call.
    let descriptor = [12u32, crate::case::TLS_BASE as u32, 0xf_ffff, 0b1_0001];
    for (at, word) in descriptor.iter().enumerate() {
        copy_in(FRAME + at as u64 * 4, &word.to_le_bytes());
    }
    let mut result = 243u64; // set_thread_area, which only the 32-bit table of calls has
    // SAFETY: the call reads and writes one user_desc in the frame and changes a TLS slot that 64-bit code does not
    // use; RBX, which the compiler keeps for itself, is put back.
    unsafe {
        core::arch::asm!(
            "xchg {pointer}, rbx", "int 0x80", "xchg {pointer}, rbx",
            pointer = inout(reg) FRAME => _, inout("rax") result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    match result as i32 {
        0 => Ok(()),
        error => {
            Err(NativeError::Host(format!("set_thread_area: {}", std::io::Error::from_raw_os_error(-error))))
        }
    }
}

fn read64(address: u64) -> u64 {
    // SAFETY: only called with addresses inside the frame, mapped and aligned for the life of the process.
    unsafe { (address as *const u64).read_volatile() }
}

fn write64(address: u64, value: u64) {
    // SAFETY: as `read64`.
    unsafe { (address as *mut u64).write_volatile(value) }
}

fn copy_in(address: u64, bytes: &[u8]) {
    // SAFETY: callers name areas that `Native::new` mapped writable, with room for `bytes`.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
}

fn copy_out(address: u64, bytes: &mut [u8]) {
    // SAFETY: callers name areas that `Native::new` mapped, at least as long as `bytes`.
    unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len()) }
}

/// The case that the engine runs now: printed if it dies of it.
static CURRENT: AtomicPtr<Case> = AtomicPtr::new(std::ptr::null_mut());

/// Notes that the engine runs `case` until the answer is dropped.
pub fn current(case: &Case) -> impl Drop + use<'_> {
    struct Note<'a>(std::marker::PhantomData<&'a Case>);
    impl Drop for Note<'_> {
        fn drop(&mut self) {
            CURRENT.store(std::ptr::null_mut(), Ordering::Release);
        }
    }
    CURRENT.store(std::ptr::from_ref(case).cast_mut(), Ordering::Release);
    Note(std::marker::PhantomData::<&Case>)
}

/// If the older handler gave up (and the signal will kill the process when it comes again), says what ran.
fn last_words(signal: i32) {
    // SAFETY: only asks for the action of a signal.
    let gave_up = unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut now);
        now.sa_sigaction == libc::SIG_DFL
    };
    // SAFETY: while it is not null the case is borrowed by the note on the stack of this thread.
    if gave_up && let Some(case) = unsafe { CURRENT.load(Ordering::Acquire).as_ref() } {
        let text = crate::case::describe(case, 7);
        eprintln!("The engine dies of signal {signal} in this case:\n{text}");
    }
}

/// Entry of the handler: the kernel leaves EFLAGS.AC as the case had it, and compiled code must not meet that.
#[unsafe(naked)]
extern "C" fn signal_entry(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    core::arch::naked_asm!("push 0x202", "popfq", "jmp {handler}", handler = sym on_signal)
}

/// The handler of every exception signal. While a case runs it records the exception and goes on at the trampoline's
/// end; otherwise it restores the default action and lets the signal come again. It runs with the case's FS base, so
/// it must not touch thread-local storage.
extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if read64(FAULT + ACTIVE) == 0 {
        let older = read64(FAULT + OLDER + signal as u64 % 32 * 8) as usize;
        if older == libc::SIG_DFL || older == libc::SIG_IGN {
            // SAFETY: async-signal-safe, resets one signal's action.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        } else {
            // SAFETY: the address is that of an SA_SIGINFO handler which was installed before this one: the
            // engine's, which maps its own code's exceptions.
            unsafe {
                let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(older);
                handler(signal, info, context);
            }
            last_words(signal);
        }
        return;
    }
    // SAFETY: the kernel hands a valid context to an SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let vector = registers[libc::REG_TRAPNO as usize] as u64;
    write64(FAULT + VECTOR, vector);
    write64(FAULT + ERROR, registers[libc::REG_ERR as usize] as u64);
    write64(FAULT + ADDRESS, if vector == 14 { registers[libc::REG_CR2 as usize] as u64 } else { 0 });
    write64(FAULT + RIP, registers[libc::REG_RIP as usize] as u64);
    write64(FAULT + TAKEN_FLAGS, registers[libc::REG_EFL as usize] as u64);
    registers[libc::REG_RIP as usize] = read64(FAULT + FINISH) as i64;
    let selectors = registers[libc::REG_CSGSFS as usize] & !0xffff;
    registers[libc::REG_CSGSFS as usize] = selectors | USER64 as i64;
    // Alignment checks, traps and the like must not follow into the trampoline.
    registers[libc::REG_EFL as usize] &= !0x4_4100;
}

fn assemble(xcr0: u64) -> Result<(Vec<u8>, u64), iced_x86::IcedError> {
    let registers = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
    let mut a = CodeAssembler::new(64)?;
    let saved = [rbx, rbp, r12, r13, r14, r15];
    for register in saved {
        a.push(register)?;
    }
    a.mov(qword_ptr(HOST), rsp)?;
    a.stmxcsr(dword_ptr(HOST + 8))?;
    a.fnstcw(word_ptr(HOST + 12))?;
    a.rdfsbase(rax)?;
    a.mov(qword_ptr(HOST + FS), rax)?;
    a.rdgsbase(rax)?;
    a.mov(qword_ptr(HOST + GS), rax)?;
    a.mov(eax, xcr0 as u32)?;
    a.xor(edx, edx)?;
    a.xrstor64(ptr(XSAVE_IN))?;
    for (n, register) in [es, ds, fs, gs].into_iter().enumerate() {
        a.mov(ecx, dword_ptr(IN + SELECTORS + n as u64 * 4))?;
        a.mov(register, ecx)?;
    }
    a.mov(rax, qword_ptr(IN + FS))?;
    a.wrfsbase(rax)?;
    a.mov(rax, qword_ptr(IN + GS))?;
    a.wrgsbase(rax)?;
    a.mov(byte_ptr(FAULT + ACTIVE), 1)?;
    a.mov(rsp, STACK)?;
    a.push(qword_ptr(IN + RFLAGS))?;
    a.popfq()?;
    for (n, register) in registers.iter().enumerate() {
        a.mov(*register, qword_ptr(IN + n as u64 * 8))?;
    }
    // Far, so that compatibility mode can be entered the same way.
    a.db(&[0xff, 0x2c, 0x25])?;
    a.db(&(TARGET as u32).to_le_bytes())?;
    let mut finish = a.create_label();
    a.set_label(&mut finish)?;
    for (n, register) in registers.iter().enumerate() {
        a.mov(qword_ptr(OUT + n as u64 * 8), *register)?;
    }
    a.mov(rsp, STACK)?;
    a.pushfq()?;
    a.pop(qword_ptr(OUT + RFLAGS))?;
    a.push(2)?;
    a.popfq()?;
    a.mov(byte_ptr(FAULT + ACTIVE), 0)?;
    a.mov(eax, xcr0 as u32)?;
    a.xor(edx, edx)?;
    a.xsave64(ptr(XSAVE_OUT))?;
    a.xrstor64(ptr(XSAVE_ZERO))?;
    for (n, register) in [es, ds, fs, gs].into_iter().enumerate() {
        a.mov(ecx, register)?;
        a.mov(dword_ptr(OUT + SELECTORS + n as u64 * 4), ecx)?;
    }
    a.rdfsbase(rax)?;
    a.mov(qword_ptr(OUT + FS), rax)?;
    a.rdgsbase(rax)?;
    a.mov(qword_ptr(OUT + GS), rax)?;
    a.xor(ecx, ecx)?;
    for register in [es, ds, fs, gs] {
        a.mov(register, ecx)?;
    }
    a.mov(rax, qword_ptr(HOST + FS))?;
    a.wrfsbase(rax)?;
    a.mov(rax, qword_ptr(HOST + GS))?;
    a.wrgsbase(rax)?;
    a.fninit()?;
    a.fldcw(word_ptr(HOST + 12))?;
    a.ldmxcsr(dword_ptr(HOST + 8))?;
    a.mov(rsp, qword_ptr(HOST))?;
    for register in saved.into_iter().rev() {
        a.pop(register)?;
    }
    a.ret()?;
    let done =
        a.assemble_options(TRAMPOLINE, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let at = done.label_ip(&finish)?;
    Ok((done.inner.code_buffer, at))
}

impl Native {
    /// Maps the areas, installs the signal handlers and an alternate stack for this thread. `xcr0` says which state
    /// is loaded and stored.
    ///
    /// # Errors
    /// When there is one already, the addresses are taken, or the host has no XSAVE.
    pub fn new(xcr0: u64) -> Result<Native, NativeError> {
        if TAKEN.swap(true, Ordering::AcqRel) {
            return Err(NativeError::Taken);
        }
        if !std::is_x86_feature_detected!("xsave") {
            return Err(NativeError::Host("it has no XSAVE".into()));
        }
        // SAFETY: getauxval has no preconditions.
        if unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 == 0 {
            return Err(NativeError::Host(
                "its kernel does not let programs set segment bases (FSGSBASE)".into(),
            ));
        }
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        map(DATA, WINDOW, writable)?;
        map(READ_ONLY, 4096, writable)?;
        map(CODE, CODE_BYTES, writable)?;
        map(FRAME, FRAME_BYTES, writable)?;
        map(TRAMPOLINE, 4096, writable | libc::PROT_EXEC)?;
        let (code, finish) = assemble(xcr0).map_err(|error| NativeError::Host(error.to_string()))?;
        copy_in(TRAMPOLINE, &code);
        write64(FAULT + FINISH, finish);
        copy_in(XSAVE_ZERO, &State::new().xsave[..]);
        set_tls_descriptor()?;
        let stack = vec![0u8; 256 << 10].leak();
        let alternate = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
        // SAFETY: the stack is leaked, so it outlives every signal; the actions name a handler that is
        // async-signal-safe and needs no thread-local storage.
        unsafe {
            libc::sigaltstack(&raw const alternate, std::ptr::null_mut());
            for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = signal_entry as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                let mut older: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const action, &raw mut older);
                write64(FAULT + OLDER + signal as u64 % 32 * 8, older.sa_sigaction as u64);
            }
        }
        Ok(Native { xcr0, finish, not_send: std::marker::PhantomData })
    }

    /// Puts `bytes` on the read-only page.
    pub fn set_read_only(&mut self, bytes: &[u8]) {
        protect(READ_ONLY, 4096, libc::PROT_READ | libc::PROT_WRITE);
        copy_in(READ_ONLY, &bytes[..4096.min(bytes.len())]);
        protect(READ_ONLY, 4096, libc::PROT_READ);
    }

    /// Fills the code area, from which `cases` run; those that go straight on end in a jump to the trampoline.
    pub fn set_code(&mut self, bytes: &[u8], cases: &[Case]) {
        protect(CODE, CODE_BYTES, libc::PROT_READ | libc::PROT_WRITE);
        copy_in(CODE, &bytes[..CODE_BYTES.min(bytes.len())]);
        for case in cases.iter().filter(|case| goes_straight(case)) {
            let end = case.address + case.code.len() as u64;
            let mut jump = [0xe9, 0, 0, 0, 0];
            jump[1..].copy_from_slice(&(self.finish.wrapping_sub(end + 5) as u32).to_le_bytes());
            copy_in(end, &jump);
        }
        protect(CODE, CODE_BYTES, libc::PROT_READ | libc::PROT_EXEC);
    }

    /// Runs `case`, whose bytes must be in the code area, over a data window that starts as `window`.
    pub fn run(&mut self, case: &Case, window: &[u8]) -> Outcome {
        copy_in(DATA, &window[..WINDOW]);
        for (address, bytes) in &case.patches {
            if (DATA..=DATA + DATA_PAGES * 4096 - bytes.len() as u64).contains(address) {
                copy_in(*address, bytes);
            }
        }
        for (n, value) in case.state.gpr.iter().enumerate() {
            write64(IN + n as u64 * 8, *value);
        }
        write64(IN + RFLAGS, case.state.rflags);
        write64(IN + FS, case.state.fs);
        write64(IN + GS, case.state.gs);
        let [extra, data, first, second] = case.state.selectors.map(u64::from);
        write64(IN + SELECTORS, extra | data << 32);
        write64(IN + SELECTORS + 8, first | second << 32);
        copy_in(XSAVE_IN, &case.state.xsave[..]);
        // The far pointer of `jmp far m16:32`.
        let selector = if case.bitness == 64 { USER64 } else { USER32 };
        write64(TARGET, case.address & 0xffff_ffff | selector << 32);
        write64(TARGET_SELECTOR, 0);
        write64(FAULT + VECTOR, 0x100);
        // SAFETY: the trampoline keeps the calling convention: it saves and restores callee-saved registers, the
        // stack pointer, segment bases, MXCSR and the x87 control word; the case it runs can write only the window
        // and the code area, or else ends in the signal handler.
        unsafe {
            let enter: extern "C" fn() = std::mem::transmute(TRAMPOLINE as usize);
            enter();
        }
        self.collect(case.address + case.code.len() as u64)
    }

    fn collect(&mut self, end: u64) -> Outcome {
        let mut state = State::new();
        for (n, value) in state.gpr.iter_mut().enumerate() {
            *value = read64(OUT + n as u64 * 8);
        }
        let vector = read64(FAULT + VECTOR);
        let faulted = vector != 0x100;
        state.rflags = if faulted { read64(FAULT + TAKEN_FLAGS) } else { read64(OUT + RFLAGS) };
        (state.fs, state.gs) = (read64(OUT + FS), read64(OUT + GS));
        for (n, selector) in state.selectors.iter_mut().enumerate() {
            let value = (read64(OUT + SELECTORS + n as u64 / 2 * 8) >> (n % 2 * 32)) as u16;
            *selector = plain_null(value);
        }
        copy_out(XSAVE_OUT, &mut state.xsave[..]);
        if self.xcr0 & 0xe0 == 0 {
            state.xsave[832..].fill(0);
        }
        let mut window = vec![0; WINDOW];
        copy_out(DATA, &mut window);
        let (fault, rip) = if faulted {
            let fault = Fault {
                vector: vector as u8,
                error: read64(FAULT + ERROR),
                address: read64(FAULT + ADDRESS),
            };
            (fault, read64(FAULT + RIP))
        } else {
            (Fault { vector: 3, error: 0, address: 0 }, end + 1)
        };
        Outcome { fault, rip, state, window }
    }
}

/// Whether `address` is mapped on the host's side alone.
#[must_use]
pub fn is_own(address: u64) -> bool {
    (FRAME..FRAME + FRAME_BYTES as u64).contains(&address)
        || (TRAMPOLINE..TRAMPOLINE + 4096).contains(&address)
}

/// Where this host keeps components 5, 6 and 7 in the standard format.
#[must_use]
pub fn wide_layout() -> WideLayout {
    [5, 6, 7].map(|component| core::arch::x86_64::__cpuid_count(0xd, component).ebx as usize)
}

const _: () = assert!(XSAVE <= 0x2000);
