//! Interrupts and exceptions: taken, looked at, survived.

use core::arch::global_asm;
use core::mem::offset_of;

use crate::cpu::{self, selector};
use crate::{Global, USER, io, println};

/// The vector by which a user snippet says that it came to its end.
pub const DONE: u64 = 0x80;

/// What the stubs push; the order is that of the assembler below.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// An exception or interrupt as it was delivered.
#[derive(Clone, Copy, Default)]
pub struct Trap {
    pub frame: Frame,
    pub cr2: u64,
    /// CR0 at delivery; the stub then clears EM and TS.
    pub cr0: u64,
    /// Where the hardware frame lay.
    pub at: u64,
}

/// A 64-bit task state segment (Intel SDM vol. 3A, 8.7).
#[repr(C, packed(4))]
pub struct Tss {
    reserved0: u32,
    pub rsp: [u64; 3],
    reserved1: u64,
    pub ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    pub io_map: u16,
    /// Room for a map of the first 65536 ports and its last byte.
    pub ports: [u8; 8192],
    end: u8,
}

pub static TSS: Global<Tss> = Global::new(Tss {
    reserved0: 0,
    rsp: [0; 3],
    reserved1: 0,
    ist: [0; 7],
    reserved2: 0,
    reserved3: 0,
    io_map: 0x68,
    ports: [0xff; 8192],
    end: 0xff,
});

#[repr(C, align(16))]
struct Stack([u8; 16 << 10]);
/// Stacks for entries from the user, for IST 1 and for the user itself.
static STACKS: Global<[Stack; 3]> = Global::new([const { Stack([0; 16 << 10]) }; 3]);

/// Top of the stack for: 0 entries from the user, 1 IST 1, 2 the user (supervisor's address).
pub fn stack_top(which: usize) -> u64 {
    STACKS.addr() + ((which as u64 + 1) * (16 << 10))
}

/// The interrupt descriptor table.
pub static IDT: Global<[[u64; 2]; 256]> = Global::new([[0; 2]; 256]);
/// Who takes a vector; without, a running `catch` ends with it.
static HANDLERS: Global<[Option<fn(&mut Frame)>; 256]> = Global::new([None; 256]);
static LAST: Global<Trap> = Global::new(Trap {
    frame: Frame {
        r15: 0,
        r14: 0,
        r13: 0,
        r12: 0,
        r11: 0,
        r10: 0,
        r9: 0,
        r8: 0,
        rdi: 0,
        rsi: 0,
        rbp: 0,
        rbx: 0,
        rdx: 0,
        rcx: 0,
        rax: 0,
        vector: 0,
        error: 0,
        rip: 0,
        cs: 0,
        rflags: 0,
        rsp: 0,
        ss: 0,
    },
    cr2: 0,
    cr0: 0,
    at: 0,
});
#[unsafe(no_mangle)]
static KIT_CATCH_RSP: Global<u64> = Global::new(0);
#[unsafe(no_mangle)]
static KIT_CR0: Global<u64> = Global::new(0);

global_asm!(
    r#"
    .text
    .balign 16
kit_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
    .else
    push 0
    .endif
    push vector
    jmp kit_trap_common
    .set vector, vector + 1
    .endr

kit_trap_common:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    mov rdi, rsp
    mov rbp, rsp
    cld
    and rsp, -16
    cmp qword ptr [rdi + {vector}], 32
    jae 1f
    # An exception may have come of CR0.TS or EM, which the code below could meet again.
    mov rax, cr0
    mov [KIT_CR0], rax
    and rax, -13
    mov cr0, rax
    call kit_trap
    jmp 2f
1:  sub rsp, 512
    fxsave64 [rsp]
    call kit_trap
    fxrstor64 [rsp]
2:  mov rsp, rbp
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq

# (function, argument, CR0 for it or 0) -> 0 when it returned, 1 when a trap ended it
    .globl kit_catch
kit_catch:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    # The old CR0, if another one is wanted.
    push 0
    mov [KIT_CATCH_RSP], rsp
    mov rax, rdi
    mov rdi, rsi
    test rdx, rdx
    jz 4f
    mov rcx, cr0
    mov [rsp], rcx
    mov cr0, rdx
4:  call rax
    xor eax, eax
3:  mov qword ptr [KIT_CATCH_RSP], 0
    cld
    pop rcx
    test rcx, rcx
    jz 5f
    mov cr0, rcx
5:
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    .globl kit_landing
kit_landing:
    mov eax, 1
    jmp 3b

# (what to enter: rip, cs, rflags, rsp, ss, argument)
    .globl kit_enter
kit_enter:
    push [rdi + 32]
    push [rdi + 24]
    push [rdi + 16]
    push [rdi + 8]
    push [rdi]
    mov rdi, [rdi + 40]
    xor eax, eax
    xor ecx, ecx
    xor edx, edx
    xor ebx, ebx
    xor esi, esi
    xor ebp, ebp
    iretq

# Where a user snippet returns to.
    .globl kit_done
kit_done:
    int 0x80
    ud2
"#,
    vector = const offset_of!(Frame, vector),
);

unsafe extern "C" {
    fn kit_stubs();
    fn kit_catch(function: unsafe extern "C" fn(u64) -> u64, argument: u64, cr0: u64) -> u64;
    fn kit_landing();
    fn kit_enter(what: u64) -> u64;
    fn kit_done();
}

/// Fills and loads the interrupt descriptor table and the task state segment.
pub fn install() {
    for vector in 0..256 {
        set_gate(vector, gate_to(vector));
    }
    // SAFETY: plain statics, nobody else looks yet.
    unsafe {
        (*TSS.ptr()).rsp = [stack_top(0), 0, 0];
        (*TSS.ptr()).ist = [stack_top(1), 0, 0, 0, 0, 0, 0];
    }
    load_idt(0xfff);
}

/// Loads the interrupt descriptor table with this limit.
pub fn load_idt(limit: u16) {
    let base = IDT.addr();
    let words: [u16; 5] = [limit, base as u16, (base >> 16) as u16, (base >> 32) as u16, (base >> 48) as u16];
    // SAFETY: the table lives forever.
    unsafe { core::arch::asm!("lidt [{}]", in(reg) words.as_ptr()) };
}

/// The kit's gate for `vector`: interrupt gate; the user may call [`DONE`] and breakpoint; double faults and
/// stack faults get IST 1.
pub fn gate_to(vector: usize) -> [u64; 2] {
    let stub = kit_stubs as *const () as u64 + vector as u64 * 16;
    let kind: u64 = if vector == DONE as usize || vector == 3 || vector == 4 { 0xee } else { 0x8e };
    let ist = u64::from(vector == 8 || vector == 12);
    gate(stub, selector::CODE, kind, ist)
}

/// A 64-bit gate (Intel SDM vol. 3A, 7.14.1): `kind` is the byte with P, DPL and type.
pub fn gate(to: u64, selector: u16, kind: u64, ist: u64) -> [u64; 2] {
    [to & 0xffff | u64::from(selector) << 16 | ist << 32 | kind << 40 | (to >> 16 & 0xffff) << 48, to >> 32]
}

pub fn set_gate(vector: usize, gate: [u64; 2]) {
    // SAFETY: the index is inside, or the guest panics.
    unsafe { (*IDT.ptr())[vector] = gate };
}

/// Calls `handler` for `vector`; it may change the frame, to which the processor then returns.
pub fn handle(vector: u8, handler: Option<fn(&mut Frame)>) {
    // SAFETY: plain static.
    unsafe { (*HANDLERS.ptr())[usize::from(vector)] = handler };
}

#[unsafe(no_mangle)]
extern "C" fn kit_trap(frame: &mut Frame) {
    // SAFETY: plain static.
    if let Some(handler) = unsafe { (*HANDLERS.ptr())[frame.vector as usize & 255] } {
        handler(frame);
        return;
    }
    let trap = Trap {
        frame: *frame,
        cr2: cpu::cr2(),
        cr0: KIT_CR0.get(),
        at: core::ptr::from_ref(&frame.rip) as u64,
    };
    let landing = KIT_CATCH_RSP.get();
    if landing == 0 {
        println!(
            "FAIL unexpected vector {} error {:#x} at {:#x} cr2 {:#x} rsp {:#x}",
            trap.frame.vector, trap.frame.error, trap.frame.rip, trap.cr2, trap.frame.rsp
        );
        io::exit(1);
    }
    LAST.set(trap);
    frame.rip = kit_landing as *const () as u64;
    frame.cs = u64::from(selector::CODE);
    frame.ss = u64::from(selector::DATA);
    frame.rsp = landing;
    frame.rflags = 2;
}

/// Calls `function` at CPL 0; the trap that ended it, or nothing if it returned.
pub fn catch(function: unsafe extern "C" fn(u64) -> u64, argument: u64) -> Option<Trap> {
    catch_with(function, argument, 0)
}

/// Like [`catch`], with another CR0 during the call, and no compiled code under it.
pub fn catch_with(function: unsafe extern "C" fn(u64) -> u64, argument: u64, cr0: u64) -> Option<Trap> {
    // SAFETY: whatever the function does to the machine is what the guest wants to see.
    (unsafe { kit_catch(function, argument, cr0) } == 1).then(|| LAST.get())
}

/// What [`enter`] loads by IRETQ.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub argument: u64,
}

/// Enters anything by IRETQ and returns with the trap that ends it.
pub fn enter(entry: &Entry) -> Trap {
    catch(kit_enter, core::ptr::from_ref(entry) as u64).unwrap_or_default()
}

/// The [`Entry`] for `function` in 64-bit user mode; it returns to `INT 80h`.
pub fn user_entry(function: unsafe extern "C" fn(u64) -> u64, argument: u64) -> Entry {
    let rsp = stack_top(2) - 8;
    // SAFETY: inside the stack.
    unsafe { (rsp as *mut u64).write_volatile(kit_done as *const () as u64 + USER) };
    Entry {
        rip: function as *const () as u64 + USER,
        cs: u64::from(selector::USER_CODE),
        rflags: 2,
        rsp: rsp + USER,
        ss: u64::from(selector::USER_DATA),
        argument,
    }
}

/// Runs `function` in user mode until its first trap; [`DONE`] when it came to its end.
pub fn user(function: unsafe extern "C" fn(u64) -> u64, argument: u64) -> Trap {
    enter(&user_entry(function, argument))
}
