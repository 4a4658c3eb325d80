//! Every interleaving of waits, answers, repeats, crashes and time-outs, up to the stated bounds: no wake-up is lost,
//! and no task ends twice or by another answer than the first. What was checked is written to the terminal.
//!
//! The model runs the product's own rules (`Meeting`). Around them it has what AWS does: a write and the completion
//! that follows it are two moments between which a function may die; a queue delivers again what was not finished,
//! and sometimes what was; Step Functions starts a failed or timed-out state anew with another token.

use fleet::ErrorName;
use fleet::workflows::rendezvous::{Answer, Meeting, Wait};
use stateright::{Checker, Model, Property};
use std::io::Write;

/// Bounds of the search.
const CRASHES: u8 = 2;
const TIME_OUTS: u8 = 1;
const REPEATED_DELIVERIES: u8 = 2;
const ATTEMPTS: u8 = 3;

const TARGET: &str = "1.2.3";

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    item: Meeting,
    /// The state's current attempt, whose token is its number; none once it has ended.
    waiting: Option<u8>,
    attempts: u8,
    /// What Step Functions took: token and whether it was a success.
    completed: Vec<(u8, bool)>,
    queue: Vec<Answer>,
    running: Vec<Invocation>,
    crashes: u8,
    time_outs: u8,
    repeats: u8,
}

/// A function at work.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Invocation {
    cause: Cause,
    /// What its write returned; none before the write.
    written: Option<Meeting>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Cause {
    Wait(u8),
    Message(Answer),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Action {
    Deliver(usize),
    DeliverAndKeep(usize),
    Write(usize),
    Complete(usize),
    Crash(usize),
    TimeOut,
}

struct Rendezvous {
    answers: Vec<Answer>,
}

fn wait(token: u8) -> Wait {
    Wait { task_token: token.to_string(), attempt: u32::from(token), expected_version: Some(TARGET.to_owned()) }
}

impl World {
    fn begin_attempt(&mut self) {
        if self.attempts == ATTEMPTS {
            self.waiting = None;
            return;
        }
        self.waiting = Some(self.attempts);
        self.running.push(Invocation { cause: Cause::Wait(self.attempts), written: None });
        self.attempts += 1;
    }

    fn complete(&mut self, written: &Meeting) {
        let Some((token, result)) = written.completion() else { return };
        let token = token.parse().expect("tokens are numbers here");
        // Step Functions takes only the token of the current attempt; others are late.
        if self.waiting == Some(token) {
            self.completed.push((token, result.is_ok()));
            self.waiting = None;
        }
    }
}

impl Model for Rendezvous {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let mut world = World {
            item: Meeting::default(),
            waiting: None,
            attempts: 0,
            completed: Vec::new(),
            queue: self.answers.clone(),
            running: Vec::new(),
            crashes: 0,
            time_outs: 0,
            repeats: 0,
        };
        world.begin_attempt();
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for message in 0..world.queue.len() {
            actions.push(Action::Deliver(message));
            if world.repeats < REPEATED_DELIVERIES {
                actions.push(Action::DeliverAndKeep(message));
            }
        }
        for (index, invocation) in world.running.iter().enumerate() {
            actions.push(if invocation.written.is_none() { Action::Write(index) } else { Action::Complete(index) });
            if world.crashes < CRASHES {
                actions.push(Action::Crash(index));
            }
        }
        if world.waiting.is_some() && world.time_outs < TIME_OUTS {
            actions.push(Action::TimeOut);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut world = world.clone();
        match action {
            Action::Deliver(message) => {
                let answer = world.queue.remove(message);
                world.running.push(Invocation { cause: Cause::Message(answer), written: None });
            }
            Action::DeliverAndKeep(message) => {
                world.repeats += 1;
                let answer = world.queue[message].clone();
                world.running.push(Invocation { cause: Cause::Message(answer), written: None });
            }
            Action::Write(index) => {
                let written = match world.running[index].cause.clone() {
                    Cause::Wait(token) => world.item.expect(&wait(token)),
                    Cause::Message(answer) => {
                        world.item.arrive(&answer);
                        true
                    }
                };
                if written {
                    world.running[index].written = Some(world.item.clone());
                } else {
                    world.running.remove(index);
                }
            }
            Action::Complete(index) => {
                if let Some(written) = world.running.remove(index).written {
                    world.complete(&written);
                }
            }
            Action::Crash(index) => {
                world.crashes += 1;
                match world.running.remove(index).cause {
                    Cause::Message(answer) => world.queue.push(answer),
                    Cause::Wait(token) if world.waiting == Some(token) => world.begin_attempt(),
                    Cause::Wait(_) => {}
                }
            }
            Action::TimeOut => {
                world.time_outs += 1;
                world.begin_attempt();
            }
        }
        // Nothing below asks how often an answer came or in which order functions were started: worlds that differ
        // only in that are one.
        world.item.arrivals = 0;
        world.queue.sort_by_key(|answer| format!("{answer:?}"));
        world.running.sort_by_key(|invocation| format!("{invocation:?}"));
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("a task ends once", |_, world: &World| world.completed.len() <= 1),
            Property::always("it ends as the first answer says", |_, world: &World| {
                let success = matches!(
                    &world.item.answer,
                    Some(Answer::Succeeded { firmware_version }) if firmware_version.as_deref() == Some(TARGET)
                );
                world.completed.iter().all(|(_, ok)| *ok == success)
            }),
            Property::always("no wake-up is lost", |_, world: &World| {
                let quiet = world.running.is_empty() && world.queue.is_empty();
                !(quiet && world.waiting.is_some() && world.item.answer.is_some())
            }),
            Property::sometimes("an answer comes before its wait", |_, world: &World| {
                world.item.answer.is_some() && world.item.task_token.is_none()
            }),
            Property::sometimes("a second attempt ends by an answer to the first", |_, world: &World| {
                world.completed.iter().any(|(token, _)| *token > 0)
            }),
            Property::sometimes("everything ends without an answer that counts", |_, world: &World| {
                world.waiting.is_none() && world.completed.is_empty()
            }),
        ]
    }
}

#[test]
fn no_interleaving_loses_a_wake_up() {
    let target = Answer::Succeeded { firmware_version: Some(TARGET.into()) };
    let other = Answer::Succeeded { firmware_version: Some("0.9.0".into()) };
    let failed = Answer::Failed { error: ErrorName::ActivationFailed, cause: "old image".into() };
    for answers in
        [vec![target.clone()], vec![target.clone(), failed.clone()], vec![failed, other], vec![target.clone(), target]]
    {
        let count = answers.len();
        let checker = Rendezvous { answers }.checker().threads(2).spawn_bfs().join();
        checker.assert_properties();
        tell(count, checker.unique_state_count());
    }
}

/// Writes past the test harness, which keeps what a test that passes prints.
fn tell(answers: usize, states: usize) {
    let line = format!(
        "model: rendezvous, answers {answers}, attempts {ATTEMPTS}: {states} states, every order, crashes up to {CRASHES}, redeliveries \
         up to {REPEATED_DELIVERIES}, time-outs up to {TIME_OUTS}: no task waits for ever, none ends twice\n"
    );
    std::io::stderr().write_all(line.as_bytes()).expect("standard error");
}
