//! The protocol over a socket pair against a toy machine, and stock GDB against the same.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use wardian_cpu::{Answer, CpuState, DebugEvent, DebugRequest, EngineError, Exit, Glance, Vcpu};
use wardian_irq::Kick;
use wardian_memory::{Gpa, GuestMemory};

use crate::{Address, Door, OpenDoor, Target, registers};

/// Linear addresses of the toy are physical ones plus this, to see that translation is used.
const SHIFT: u64 = 0xffff_8000_0000_0000;
const CODE: u64 = 0x1000;
const DATA: u64 = 0x3000;

struct NoKick;
impl Kick for NoKick {
    fn kick(&self) {}
}

/// A processor of four instructions: NOP (90), INC RAX (48 FF C0), JMP short (EB), MOV [RDI], AL (88 07).
struct Toy {
    state: CpuState,
    debug: DebugRequest,
    memory: GuestMemory,
    /// The instruction at RIP is the one that stopped us before.
    at_breakpoint: bool,
}

impl Toy {
    fn new(memory: GuestMemory, rip: u64) -> Toy {
        let mut state = CpuState::reset();
        state.rip = rip;
        state.segments[CpuState::CS].base = 0;
        Toy { state, debug: DebugRequest::default(), memory, at_breakpoint: false }
    }
}

impl Vcpu for Toy {
    fn run(&mut self, _answer: Answer) -> Result<Exit, EngineError> {
        let rip = self.state.rip;
        if self.debug.breakpoints.contains(&rip) && !std::mem::replace(&mut self.at_breakpoint, true) {
            return Ok(Exit::Debug(DebugEvent::Breakpoint(rip)));
        }
        self.at_breakpoint = false;
        let mut code = [0; 3];
        self.memory.read(Gpa(rip.wrapping_sub(SHIFT)), &mut code).unwrap();
        let mut watched = None;
        match code {
            [0x90, ..] => self.state.rip += 1,
            [0x48, 0xff, 0xc0] => {
                self.state.gpr[0] += 1;
                self.state.rip += 3;
            }
            [0xeb, by, _] => self.state.rip = (rip + 2).wrapping_add(by as i8 as u64),
            [0x88, 0x07, _] => {
                let to = self.state.gpr[7];
                self.memory.write(Gpa(to.wrapping_sub(SHIFT)), &[self.state.gpr[0] as u8]).unwrap();
                self.state.rip += 2;
                let hit = |(start, len, _, write): &&(u64, u64, bool, bool)| {
                    *write && to.wrapping_sub(*start) < *len
                };
                watched = self.debug.watchpoints.iter().find(hit).map(|_| to);
            }
            other => panic!("the toy met {other:x?} at {rip:#x}"),
        }
        Ok(match watched {
            Some(to) => Exit::Debug(DebugEvent::Watchpoint(to)),
            None if self.debug.single_step => Exit::Debug(DebugEvent::Step),
            None => Exit::Interrupted,
        })
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
        Arc::new(NoKick)
    }
    fn set_debug(&mut self, request: &DebugRequest) {
        self.debug = request.clone();
    }
    fn translate(&mut self, linear: u64) -> Option<u64> {
        linear.checked_sub(SHIFT)
    }
    fn resumed(&mut self) {}
}

/// Toys on one thread each, with the parking that a machine has.
struct Machine {
    memory: GuestMemory,
    toys: Vec<Mutex<Toy>>,
    running: Mutex<Vec<bool>>,
    changed: Condvar,
    over: AtomicBool,
    killed: AtomicBool,
    door: OnceLock<OpenDoor>,
}

impl Machine {
    /// `count` vCPUs, each at its own copy of the program, all running.
    fn start(count: usize) -> Arc<Machine> {
        let memory = GuestMemory::new(0x10000).unwrap();
        let toys = (0..count).map(|index| {
            let at = CODE + 0x100 * index as u64;
            // nop; inc rax; mov [rdi], al; nop; jmp -9
            memory.write(Gpa(at), &[0x90, 0x48, 0xff, 0xc0, 0x88, 0x07, 0x90, 0xeb, 0xf7]).unwrap();
            let mut toy = Toy::new(memory.clone(), SHIFT + at);
            toy.state.gpr[7] = SHIFT + DATA + 8 * index as u64;
            Mutex::new(toy)
        });
        let machine = Arc::new(Machine {
            toys: toys.collect(),
            memory,
            running: Mutex::new(vec![true; count]),
            changed: Condvar::new(),
            over: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            door: OnceLock::new(),
        });
        for index in 0..count {
            let machine = Arc::clone(&machine);
            std::thread::spawn(move || machine.run(index));
        }
        machine
    }

    fn run(&self, index: usize) {
        while !self.over.load(Ordering::Acquire) {
            let mut running = self.running.lock().unwrap();
            while !running[index] && !self.over.load(Ordering::Acquire) {
                running = self.changed.wait(running).unwrap();
            }
            // The toy is taken before the flag is let go, so `stop` cannot overtake us.
            let mut toy = self.toys[index].lock().unwrap();
            drop(running);
            let exit = toy.run(Answer::None).unwrap();
            drop(toy);
            if let Exit::Debug(event) = exit {
                self.running.lock().unwrap()[index] = false;
                if !self.door.get().is_some_and(|door| door.stopped(index, event)) {
                    self.running.lock().unwrap()[index] = true;
                }
            }
            std::thread::yield_now();
        }
    }

    fn open(self: &Arc<Machine>, address: &Address) -> Address {
        let door = Door::listen(address).unwrap();
        let at = door.address().clone();
        let open = door.open(Arc::clone(self) as Arc<dyn Target>).unwrap();
        assert!(self.door.set(open).is_ok());
        at
    }

    fn rax(&self, index: usize) -> u64 {
        self.toys[index].lock().unwrap().state.gpr[0]
    }

    fn runs(&self, index: usize) -> bool {
        let before = self.rax(index);
        for _ in 0..2000 {
            if self.rax(index) != before {
                return true;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        false
    }
}

impl Target for Machine {
    fn vcpus(&self) -> usize {
        self.toys.len()
    }
    fn memory(&self) -> Option<GuestMemory> {
        Some(self.memory.clone())
    }
    fn stop(&self) {
        self.running.lock().unwrap().fill(false);
        for toy in &self.toys {
            drop(toy.lock().unwrap());
        }
    }
    fn resume(&self, run: &[bool]) {
        let mut running = self.running.lock().unwrap();
        running.iter_mut().zip(run).for_each(|(is, run)| *is |= *run);
        self.changed.notify_all();
    }
    fn with_vcpu(&self, index: usize, f: &mut dyn FnMut(&mut dyn Vcpu)) -> bool {
        match self.toys.get(index) {
            Some(toy) if !self.running.lock().unwrap()[index] => {
                f(&mut *toy.lock().unwrap());
                true
            }
            _ => false,
        }
    }
    fn describe(&self, index: usize) -> String {
        format!("toy {index}")
    }
    fn kill(&self) {
        self.killed.store(true, Ordering::Release);
    }
}

/// A debugger made of packets.
struct Client {
    socket: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    fn attach(machine: &Arc<Machine>) -> (Client, tempdir::Dir) {
        let dir = tempdir::Dir::new();
        let Address::Path(path) = machine.open(&Address::Path(dir.0.join("gdb"))) else { panic!("no path") };
        (Client::connect(&path), dir)
    }

    fn connect(path: &std::path::Path) -> Client {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut client = Client { socket, buffer: Vec::new() };
        let hello = client.ask("qSupported:multiprocess+;swbreak+;hwbreak+;vContSupported+");
        for feature in ["PacketSize=", "swbreak+", "hwbreak+", "vContSupported+", "qXfer:features:read+"] {
            assert!(hello.contains(feature), "{feature} in {hello}");
        }
        client
    }

    fn send(&mut self, packet: &str) {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        self.socket.write_all(format!("${packet}#{sum:02x}").as_bytes()).unwrap();
    }

    fn receive(&mut self) -> String {
        loop {
            let start = self.buffer.iter().position(|b| *b == b'$');
            let end = self.buffer.iter().position(|b| *b == b'#');
            if let (Some(start), Some(end)) = (start, end)
                && self.buffer.len() >= end + 3
            {
                let packet = String::from_utf8_lossy(&self.buffer[start + 1..end]).into_owned();
                self.buffer.drain(..end + 3);
                let _ = self.socket.write_all(b"+"); // the door may have closed after its last word
                return unrle(&packet);
            }
            let mut chunk = [0; 4096];
            let len = self.socket.read(&mut chunk).unwrap();
            assert_ne!(len, 0, "the door hung up");
            self.buffer.extend(&chunk[..len]);
        }
    }

    fn ask(&mut self, packet: &str) -> String {
        self.send(packet);
        self.receive()
    }

    fn rip(&mut self) -> u64 {
        let hex = self.ask("p10");
        u64::from_str_radix(&hex, 16).unwrap().swap_bytes()
    }
}

/// Undoes run-length encoding: `x*c` repeats x another (c - 29) times.
fn unrle(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c == '*' {
            let count = chars.next().unwrap() as usize - 29;
            let last = out.chars().last().unwrap();
            out.extend(std::iter::repeat_n(last, count));
        } else {
            out.push(c);
        }
    }
    out
}

mod tempdir {
    //! A directory that goes with the test.
    use std::sync::atomic::{AtomicU32, Ordering};
    pub struct Dir(pub std::path::PathBuf);
    static NEXT: AtomicU32 = AtomicU32::new(0);
    impl Dir {
        pub fn new() -> Dir {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("wardian-gdb-{}-{number}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Dir(path)
        }
    }
    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

#[test]
fn registers_survive_a_round_trip() {
    let mut state = CpuState::reset();
    let values: Vec<Vec<u8>> = (0..registers::COUNT)
        .map(|number| {
            (0..registers::size(number).unwrap()).map(|byte| (number * 7 + byte) as u8 | 1).collect()
        })
        .collect();
    for (number, value) in values.iter().enumerate() {
        let selector_or_cr8 = (18..24).contains(&number) || number == 64;
        // fctrl.. and fop carry fewer bits than the wire has; ftag is recomputed.
        if !(32..40).contains(&number) {
            assert_eq!(registers::write(&mut state, number, value).is_none(), selector_or_cr8, "{number}");
        }
    }
    for (number, value) in values.iter().enumerate() {
        let mut out = [0; 16];
        assert_eq!(registers::read(&state, number, &mut out), value.len());
        if (18..24).contains(&number) || (32..40).contains(&number) || number == 64 {
            continue;
        }
        assert_eq!(out[..value.len()], value[..], "register {number}");
    }
    assert_eq!(state.gpr[3], u64::from_le_bytes(values[1].clone().try_into().unwrap()), "rbx is number 1");
    assert!(registers::write(&mut state, registers::COUNT, &[0; 16]).is_none());
    assert!(registers::write(&mut state, 0, &[0; 7]).is_none());
}

#[test]
fn absent_vector_state_reads_as_initial() {
    let mut state = CpuState::reset();
    state.xsave[32..576].fill(0xee);
    state.xsave[512] = 0;
    let mut out = [0; 16];
    registers::read(&state, 24, &mut out);
    assert_eq!(out, [0; 16]);
    registers::read(&state, 34, &mut out);
    assert_eq!(out[..4], [0xff, 0xff, 0, 0], "all tags empty");
    registers::read(&state, 56, &mut out);
    assert_eq!(out[..4], 0x1f80u32.to_le_bytes());
    registers::write(&mut state, 40, &[5; 16]).unwrap();
    assert_eq!(state.xsave[512], 2);
    assert_eq!(state.xsave[160..176], [5; 16]);
    assert_eq!(state.xsave[176..192], [0; 16], "the neighbours come from the initial state");
}

#[test]
fn tags_follow_the_values() {
    let mut state = CpuState::reset();
    state.xsave[512] = 1;
    state.xsave[2..4].copy_from_slice(&(6u16 << 11).to_le_bytes()); // TOP = 6: ST0 is physical 6
    state.xsave[4] = 0b1100_0000;
    state.xsave[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]); // ST0 = 1.0
    state.xsave[48..58].fill(0); // ST1 = 0.0
    let mut out = [0; 16];
    registers::read(&state, 34, &mut out);
    assert_eq!(u16::from_le_bytes([out[0], out[1]]), 0b01_00_11_11_11_11_11_11);
}

#[test]
fn the_description_lists_every_register_in_order() {
    let names: Vec<(&str, usize)> = registers::XML
        .split("<reg name=\"")
        .skip(1)
        .map(|part| {
            let (name, rest) = part.split_once('"').unwrap();
            let bits = rest.split_once("bitsize=\"").unwrap().1.split_once('"').unwrap().0;
            (name, bits.parse::<usize>().unwrap())
        })
        .collect();
    assert_eq!(names.len(), registers::COUNT);
    for (number, (name, bits)) in names.iter().enumerate() {
        assert_eq!(registers::size(number), Some(bits / 8), "{name}");
    }
    assert_eq!(names[registers::RIP].0, "rip");
    assert_eq!(names[64].0, "cr8");
}

#[test]
fn addresses_are_ports_or_paths() {
    assert_eq!("1234".parse::<Address>().unwrap(), Address::Port(1234));
    assert_eq!("./1234".parse::<Address>().unwrap(), Address::Path("./1234".into()));
    assert!("70000".parse::<Address>().is_err());
    assert!("".parse::<Address>().is_err());
}

#[test]
fn a_socket_is_private_and_goes_with_the_door() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempdir::Dir::new();
    let path = dir.0.join("gdb");
    // A dead socket is replaced, a live one and a plain file are not.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let machine = Machine::start(1);
    let open = Door::listen(&Address::Path(path.clone())).unwrap().open(Arc::clone(&machine) as _).unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(Door::listen(&Address::Path(path.clone())).is_err());
    drop(open);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    assert!(Door::listen(&Address::Path(path.clone())).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    machine.over.store(true, Ordering::Release);
}

#[test]
fn attach_step_break_watch_detach() {
    let machine = Machine::start(2);
    let (mut gdb, _dir) = Client::attach(&machine);
    assert!(gdb.ask("?").starts_with("T05"));
    assert!(!machine.runs(0) && !machine.runs(1), "attaching parks every vCPU");
    assert_eq!(gdb.ask("qfThreadInfo"), "mp01.01,p01.02");
    assert_eq!(gdb.ask("Hgp1.1"), "OK");

    // Break at the NOP after the store, on both programs' addresses; vCPU 0 gets there.
    let at = SHIFT + CODE + 6;
    assert_eq!(gdb.ask(&format!("Z0,{at:x},1")), "OK");
    let stop = gdb.ask("vCont;c");
    assert!(stop.contains("thread:p01.01") && stop.contains("swbreak"), "{stop}");
    assert_eq!(gdb.rip(), at);
    let mut code = [0; 9];
    machine.memory.read(Gpa(CODE), &mut code).unwrap();
    assert_eq!(code[6], 0x90, "a breakpoint does not patch memory");
    assert_eq!(gdb.ask(&format!("m{:x},2", SHIFT + CODE)), "9048");
    assert!(gdb.ask("m1000,2").starts_with('E'), "no linear address 0x1000");
    assert_eq!(gdb.ask(&format!("z0,{at:x},1")), "OK");

    // One step with the other vCPU held.
    let other = machine.rax(1);
    let stop = gdb.ask("vCont;s:p1.1");
    assert!(stop.contains("thread:p01.01"), "{stop}");
    assert_eq!(gdb.rip(), at + 1);
    assert_eq!(machine.rax(1), other);

    // A range step ends with the first instruction outside the range.
    let stop = gdb.ask(&format!("vCont;r{:x},{:x}:p1.1", at + 1, at + 3));
    assert!(stop.contains("thread:p01.01"), "{stop}");
    assert_eq!(gdb.rip(), SHIFT + CODE);
    gdb.ask(&format!("vCont;r{:x},{:x}:p1.1", SHIFT + CODE, SHIFT + CODE + 4));
    assert_eq!(gdb.rip(), SHIFT + CODE + 4);

    // A watchpoint on vCPU 1's cell, everybody running.
    let cell = SHIFT + DATA + 8;
    assert_eq!(gdb.ask(&format!("Z2,{cell:x},1")), "OK");
    let stop = gdb.ask("vCont;c");
    assert!(stop.contains(&format!("watch:{cell:x}")) && stop.contains("thread:p01.02"), "{stop}");
    assert_eq!(gdb.ask(&format!("z2,{cell:x},1")), "OK");

    // Registers and memory can be written.
    assert_eq!(gdb.ask("Hgp1.2"), "OK");
    assert_eq!(gdb.ask("P0=efbeadde00000000"), "OK");
    assert_eq!(machine.rax(1), 0xdead_beef);
    assert_eq!(gdb.ask(&format!("M{:x},2:abcd", SHIFT + DATA + 0x100)), "OK");
    let mut two = [0; 2];
    machine.memory.read(Gpa(DATA + 0x100), &mut two).unwrap();
    assert_eq!(two, [0xab, 0xcd]);

    // Ctrl-C.
    gdb.send("vCont;c");
    assert!(machine.runs(1));
    gdb.socket.write_all(&[3]).unwrap();
    assert!(gdb.receive().starts_with("T02"));
    assert!(!machine.runs(1));

    assert_eq!(gdb.ask("D;1"), "OK");
    assert!(machine.runs(0) && machine.runs(1), "detaching lets all go on");
    machine.over.store(true, Ordering::Release);
}

#[test]
fn hanging_up_or_nonsense_lets_the_machine_go_on() {
    let machine = Machine::start(1);
    let (gdb, dir) = Client::attach(&machine);
    drop(gdb);
    assert!(machine.runs(0), "after hanging up");
    let mut gdb = Client::connect(&dir.0.join("gdb"));
    assert_eq!(gdb.ask(&format!("Z0,{:x},1", SHIFT + CODE)), "OK");
    gdb.socket.write_all(&[b'$'; 40_000]).unwrap();
    assert!(machine.runs(0), "after a packet without end, and without its breakpoint");
    machine.over.store(true, Ordering::Release);
}

#[test]
fn the_end_of_the_machine_and_a_kill_are_told() {
    let machine = Machine::start(1);
    let (mut gdb, dir) = Client::attach(&machine);
    assert!(gdb.ask("?").starts_with("T05"));
    gdb.send("k");
    for _ in 0..1000 {
        if machine.killed.load(Ordering::Acquire) {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(machine.killed.load(Ordering::Acquire));
    let mut gdb = Client::connect(&dir.0.join("gdb"));
    gdb.send("vCont;c");
    assert!(machine.runs(0));
    machine.door.get().unwrap().ended(7);
    assert_eq!(gdb.receive(), "W07");
    machine.over.store(true, Ordering::Release);
}

#[test]
fn a_rebuilt_machine_keeps_its_breakpoints() {
    let machine = Machine::start(1);
    let (mut gdb, _dir) = Client::attach(&machine);
    let at = SHIFT + CODE + 4;
    assert_eq!(gdb.ask(&format!("Z1,{at:x},1")), "OK");
    let stop = gdb.ask("vCont;c");
    assert!(stop.contains("thread:p01.01"), "{stop}");
    assert_eq!(gdb.ask(&format!("z1,{at:x},1")), "OK");
    gdb.send("vCont;c");
    assert!(machine.runs(0));
    machine.stop();
    *machine.toys[0].lock().unwrap() = Toy::new(machine.memory.clone(), SHIFT + CODE);
    machine.toys[0].lock().unwrap().state.gpr[7] = SHIFT + DATA;
    assert!(machine.door.get().unwrap().rebuilt());
    assert!(machine.runs(0), "the session lets the new vCPUs go");
    machine.over.store(true, Ordering::Release);
}

#[test]
fn stock_gdb_attaches_breaks_steps_and_detaches() {
    static HAVE: OnceLock<bool> = OnceLock::new();
    if !HAVE.get_or_init(|| Command::new("gdb").arg("--version").output().is_ok()) {
        eprintln!("skipped, because gdb is not installed");
        return;
    }
    let machine = Machine::start(2);
    let Address::Port(port) = machine.open(&Address::Port(0)) else { panic!("no port") };
    let at = SHIFT + CODE + 6;
    let cell = SHIFT + DATA;
    let script = [
        "set pagination off".to_owned(),
        "set architecture i386:x86-64".to_owned(),
        format!("target remote 127.0.0.1:{port}"),
        "info threads".to_owned(),
        format!("break *{at:#x}"),
        "continue".to_owned(),
        "printf \"at %lx\\n\", $rip".to_owned(),
        "stepi".to_owned(),
        "printf \"then %lx\\n\", $rip".to_owned(),
        "delete".to_owned(),
        format!("watch *(char*){cell:#x}"),
        "continue".to_owned(),
        "delete".to_owned(),
        "p $cr0".to_owned(),
        "p/x $efer".to_owned(),
        "p $st0".to_owned(),
        "p $xmm3.v4_int32".to_owned(),
        "p $ymm1.v8_int32".to_owned(),
        "p $fs_base".to_owned(),
        format!("x/3i {:#x}", SHIFT + CODE),
        "set scheduler-locking on".to_owned(),
        "stepi".to_owned(),
        "stepi".to_owned(),
        "p $rax = 4242".to_owned(),
        "p $rax".to_owned(),
        "detach".to_owned(),
    ];
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch"]);
    for line in &script {
        gdb.args(["-ex", line]);
    }
    let output = gdb.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let all = format!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    for want in [
        "toy 1",
        &format!("at {at:x}"),
        &format!("then {:x}", at + 1),
        "Hardware watchpoint",
        "Old value",
        "[ ET NW CD ]",
        "inc    %rax",
        "= 4242",
        "detached]",
    ] {
        assert!(all.contains(want), "{want:?} is missing in:\n{all}");
    }
    assert!(!all.contains("rror"), "{all}");
    assert!(machine.runs(0) && machine.runs(1), "{all}");
    machine.over.store(true, Ordering::Release);
}
