//! Commands to machines that run.

use std::io::{self, Write};
use std::time::Duration;

use clap_complete::engine::CompletionCandidate;
use serde_json::{Value, json};
use wardian_control::{Client, ClientError, Directory, PlaceError, attach};
use wardian_machine::status;

use crate::args::{Name, One, Output, Remote};

/// A machine that is stopped or stuck does not hold up a list of all.
const GLANCE: Duration = Duration::from_secs(2);

/// A command that did not go well.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemoteError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("'{text}' is no JSON")]
    Json {
        text: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("Could not print")]
    Print(#[from] io::Error),
}

impl RemoteError {
    pub(crate) fn status(&self) -> u8 {
        match self {
            RemoteError::Client(ClientError::NoMachine(_) | ClientError::Refused { .. })
            | RemoteError::Json { .. } => status::BAD_INPUT,
            // A reader that has read enough.
            RemoteError::Print(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            _ => status::HOST,
        }
    }
}

/// The names that a shell may complete.
pub(crate) fn candidates() -> Vec<CompletionCandidate> {
    let names = Directory::open().and_then(|directory| directory.names()).unwrap_or_default();
    names.into_iter().map(CompletionCandidate::new).collect()
}

fn client(name: &Name) -> Result<Client, RemoteError> {
    Ok(Client::find(&Directory::open()?, &name.name)?)
}

pub(crate) fn run(command: Remote) -> Result<u8, RemoteError> {
    match command {
        Remote::List(output) => list(output)?,
        Remote::Info(one) => print(&one, &client(&one.name)?.get("/info")?)?,
        Remote::Console { one, past } => {
            if attach(&client(&one)?, past)? {
                eprintln!("\r\nwardian: {} has ended", one.name);
            } else {
                eprintln!("\r\nwardian: Left {}, which goes on", one.name);
            }
        }
        Remote::Pause(one) => act(&one, "/pause", None)?,
        Remote::Resume { one, clock } => {
            act(&one, "/resume", clock.map(|clock| json!({ "clock": clock })).as_ref())?;
        }
        Remote::Stop { one, now, timeout } => stop(&one, now, Duration::from_secs(timeout))?,
        Remote::Reset(one) => act(&one, "/reset", None)?,
        Remote::Nmi { one, vcpu } => act(&one, "/nmi", vcpu.map(|vcpu| json!({ "vcpu": vcpu })).as_ref())?,
        Remote::Wait(one) => {
            let end = client(&one.name)?.wait(None)?.unwrap_or_default();
            print(&one, &end)?;
            return Ok(end["status"]
                .as_u64()
                .and_then(|status| u8::try_from(status).ok())
                .unwrap_or(status::HOST));
        }
        Remote::Events { one, past, no_follow } => events(&one, past, !no_follow)?,
        Remote::Inspect { one, path } => {
            let tree = client(&one.name)?.get(&address(&path))?;
            if one.output.json {
                print(&one, &tree)?;
            } else {
                io::stdout().write_all(outline(&tree, 0).as_bytes())?;
            }
        }
        Remote::Metrics(one) if one.output.json => print(&one, &client(&one.name)?.get("/stats")?)?,
        Remote::Metrics(one) => io::stdout().write_all(&client(&one.name)?.call("GET", "/metrics", None)?)?,
        Remote::Call { one, method, path, body } => {
            let parse = |text: String| {
                serde_json::from_str(&text).map_err(|source| RemoteError::Json { text, source })
            };
            let body: Option<Value> = body.map(parse).transpose()?;
            io::stdout().write_all(&client(&one)?.call(&method, &path, body.as_ref())?)?;
        }
    }
    Ok(0)
}

/// Where a part of the tree of values is.
fn address(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~:@".contains(&byte);
    let path = path.trim_matches('/');
    let escaped = path
        .bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect::<String>();
    if path.is_empty() { "/inspect".to_owned() } else { format!("/inspect/{escaped}") }
}

fn list(output: Output) -> Result<(), RemoteError> {
    let directory = Directory::open()?;
    let mut all = Vec::new();
    for name in directory.names()? {
        match Client::find(&directory, &name).and_then(|client| client.patient_for(GLANCE).get("/info")) {
            Ok(info) => all.push(info),
            // It has just ended.
            Err(ClientError::NoMachine(_)) => {}
            Err(_) => all.push(json!({ "name": name, "status": "silent" })),
        }
    }
    if output.json {
        return Ok(writeln!(io::stdout(), "{}", Value::Array(all))?);
    }
    if all.is_empty() {
        eprintln!("wardian: No machine runs");
        return Ok(());
    }
    let mut text =
        format!("{:<24} {:>8} {:<10} {:>4} {:>8}  KERNEL\n", "NAME", "PID", "STATUS", "CPUS", "MEMORY");
    for info in &all {
        let word = |field: &str| info[field].as_str().unwrap_or("-").to_owned();
        let number =
            |field: &str| info[field].as_u64().map_or_else(|| "-".to_owned(), |number| number.to_string());
        let memory =
            info["memory"].as_u64().map_or_else(|| "-".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        let (name, status) = (word("name"), word("status"));
        let (pid, cpus, kernel) = (number("pid"), number("cpus"), word("kernel"));
        text += &format!("{name:<24} {pid:>8} {status:<10} {cpus:>4} {memory:>8}  {kernel}\n");
    }
    Ok(io::stdout().write_all(text.as_bytes())?)
}

/// Has something done and prints what came of it.
fn act(one: &One, path: &str, body: Option<&Value>) -> Result<(), RemoteError> {
    print(one, &client(&one.name)?.post(path, body)?)
}

fn stop(one: &One, now: bool, limit: Duration) -> Result<(), RemoteError> {
    let client = client(&one.name)?;
    let end = |how: &str| client.post("/stop", Some(&json!({ "how": how })));
    if !now {
        match end("button") {
            Ok(_) => {}
            // Between two lives it has none.
            Err(ClientError::Refused { status: 409, .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if let Ok(Some(ended)) = client.wait(Some(limit)) {
            return print(one, &ended);
        }
    }
    match end("now") {
        Ok(_) | Err(ClientError::Refused { status: 409, .. }) => {}
        Err(error) => return Err(error.into()),
    }
    match client.wait(None) {
        Ok(ended) => print(one, &ended.unwrap_or_default()),
        // It was faster than the question.
        Err(ClientError::Connection { .. }) => print(one, &json!({ "text": "Ended from outside" })),
        Err(error) => Err(error.into()),
    }
}

fn events(one: &One, past: Option<usize>, follow: bool) -> Result<(), RemoteError> {
    let past = past.map(|past| format!("&past={past}")).unwrap_or_default();
    let mut printed = Ok(());
    client(&one.name)?.lines(&format!("/events?follow={follow}{past}"), |line| {
        let mut stdout = io::stdout().lock();
        printed = match serde_json::from_slice::<Value>(line) {
            Ok(event) if !one.output.json => {
                let seconds = event["guest_ns"].as_u64().unwrap_or_default() as f64 / 1e9;
                let text = event["text"].as_str().or(event["event"].as_str()).unwrap_or_default();
                writeln!(stdout, "{seconds:>12.3}  {text}")
            }
            _ => stdout.write_all(line).and_then(|()| stdout.write_all(b"\n")),
        }
        .and_then(|()| stdout.flush());
        printed.is_ok()
    })?;
    Ok(printed?)
}

/// Prints an object: as JSON, or a line for each field.
fn print(one: &One, value: &Value) -> Result<(), RemoteError> {
    let mut stdout = io::stdout().lock();
    if one.output.json {
        writeln!(stdout, "{value}")?;
    } else {
        stdout.write_all(outline(value, 0).as_bytes())?;
    }
    Ok(())
}

/// A tree of values for people.
fn outline(value: &Value, depth: usize) -> String {
    let indent = "  ".repeat(depth);
    let named = |name: &str, value: &Value| match value {
        Value::Object(_) | Value::Array(_) => format!("{indent}{name}\n{}", outline(value, depth + 1)),
        Value::String(text) => format!("{indent}{name}: {text}\n"),
        Value::Null => String::new(),
        other => format!("{indent}{name}: {other}\n"),
    };
    match value {
        Value::Object(all) => all.iter().map(|(name, value)| named(name, value)).collect(),
        Value::Array(all) => all.iter().enumerate().map(|(n, value)| named(&n.to_string(), value)).collect(),
        Value::String(text) => format!("{indent}{text}\n"),
        other => format!("{indent}{other}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::{address, outline};
    use serde_json::json;

    #[test]
    fn trees_are_printed_as_outlines() {
        let tree = json!({ "a": { "b": 1, "c": "x" }, "d": [true], "e": null });
        assert_eq!(outline(&tree, 0), "a\n  b: 1\n  c: x\nd\n  0: true\n");
        assert_eq!(outline(&json!("x"), 1), "  x\n");
    }

    #[test]
    fn paths_are_escaped() {
        assert_eq!(address("/devices/pci/00:01.0/a b?"), "/inspect/devices/pci/00:01.0/a%20b%3F");
        assert_eq!(address(""), "/inspect");
    }
}
