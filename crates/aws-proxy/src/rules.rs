//! Which calls are disturbed, and how.

use crate::calls::Operation;
use memchr::memmem;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// A rule. Of the calls that it matches it leaves the first `skip` alone, and disturbs `times` after them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// Its name, by which it is found again.
    pub name: String,
    /// What must be in the path or in the body, such as a thing's name.
    pub contains: String,
    /// What must be in the calling Lambda function's name. With none, a call of any function matches, and of others too, such
    /// as a state machine's own tasks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
    /// `service.Operation`; any, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// How many matching calls pass before it begins.
    #[serde(default)]
    pub skip: u32,
    /// How many it disturbs.
    #[serde(default = "once")]
    pub times: u32,
    /// For how many milliseconds it disturbs, from the first of them on; then `times` does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lasts: Option<u64>,
    /// What it does.
    pub effect: Effect,
}

fn once() -> u32 {
    1
}

/// What a rule does to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Effect {
    /// The API refuses the call for its rate.
    Throttle,
    /// The API fails with an error of its own.
    Unavailable,
    /// The call is carried out, and its connection breaks before the answer. Matches calls of functions only: Step Functions sees to
    /// the connections of its own tasks itself.
    LoseAnswer,
    /// The call waits for so many milliseconds.
    Delay(u64),
    /// The calling Lambda function's process is killed before the call. Matches calls of functions only.
    KillBefore,
    /// The call is carried out, then the process is killed. Matches calls of functions only.
    KillAfter,
}

/// A rule, and what it has done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The rule.
    pub rule: Rule,
    /// How many calls it has matched.
    pub matched: u32,
    /// The calls that it has disturbed: function and operation.
    pub disturbed: Vec<String>,
    /// When a rule that lasts has begun.
    #[serde(skip)]
    began: Option<Instant>,
}

impl From<Rule> for State {
    fn from(rule: Rule) -> Self {
        Self { rule, matched: 0, disturbed: Vec::new(), began: None }
    }
}

/// A call as the rules see it.
pub(crate) struct Call<'a> {
    pub(crate) function: Option<&'a str>,
    pub(crate) operation: &'a Operation,
    pub(crate) path: &'a str,
    pub(crate) body: &'a [u8],
}

impl State {
    fn matches(&self, call: &Call<'_>) -> bool {
        let Rule { contains, function, operation, effect, .. } = &self.rule;
        let needs_process = matches!(effect, Effect::KillBefore | Effect::KillAfter | Effect::LoseAnswer);
        let Operation { service, name } = call.operation;
        (call.function.is_some() || !needs_process)
            && function.as_ref().is_none_or(|part| call.function.is_some_and(|name| name.contains(part)))
            && operation.as_ref().is_none_or(|wanted| wanted.split_once('.') == Some((service, name)))
            && (call.path.contains(contains) || memmem::find(call.body, contains.as_bytes()).is_some())
    }

    /// What is to be done with the call.
    pub(crate) fn effect(&mut self, call: &Call<'_>) -> Option<Effect> {
        if !self.matches(call) {
            return None;
        }
        self.matched += 1;
        let Rule { skip, times, lasts, effect, .. } = self.rule;
        if self.matched <= skip {
            return None;
        }
        let is_over = match lasts.map(Duration::from_millis) {
            Some(time) => self.began.get_or_insert_with(Instant::now).elapsed() >= time,
            None => self.matched > skip.saturating_add(times),
        };
        if is_over {
            return None;
        }
        let Operation { service, name } = call.operation;
        self.disturbed.push(format!("{} {service}.{name}", call.function.unwrap_or("-")));
        Some(effect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(effect: Effect) -> Rule {
        Rule {
            name: "r".into(),
            contains: "thing-1".into(),
            function: None,
            operation: None,
            skip: 1,
            times: 2,
            lasts: None,
            effect,
        }
    }

    #[test]
    fn a_rule_disturbs_some_of_the_calls_that_it_matches() {
        let operation = Operation { service: "iot".into(), name: "DescribeThing".into() };
        let call = |path, body| Call { function: None, operation: &operation, path, body };
        let mut state = State::from(rule(Effect::Throttle));
        let effects: Vec<_> =
            [("/things/thing-1", ""), ("/", "no"), ("/", "a thing-1"), ("/thing-1", ""), ("/thing-1", "")]
                .into_iter()
                .map(|(path, body)| state.effect(&call(path, body.as_bytes())).is_some())
                .collect();
        assert_eq!(effects, [false, false, true, true, false]);
        assert_eq!((state.matched, state.disturbed.len()), (4, 2));
    }

    #[test]
    fn an_outage_lasts_as_long_as_it_lasts_and_no_longer() {
        let operation = Operation { service: "iot".into(), name: "DescribeThing".into() };
        let call = Call { function: None, operation: &operation, path: "/thing-1", body: b"" };
        let mut state = State::from(Rule { lasts: Some(60_000), ..rule(Effect::Unavailable) });
        let effects: Vec<_> = (0..5).map(|_| state.effect(&call).is_some()).collect();
        assert_eq!(effects, [false, true, true, true, true], "{state:?}");
        let mut state = State::from(Rule { lasts: Some(0), ..rule(Effect::Unavailable) });
        assert_eq!([state.effect(&call), state.effect(&call)], [None, None]);
    }

    #[test]
    fn only_a_function_can_be_killed_and_only_the_one_that_is_meant() {
        let operation = Operation { service: "iot".into(), name: "DescribeThing".into() };
        let call = |function, path| Call { function, operation: &operation, path, body: b"" };
        let mut state = State::from(Rule { skip: 0, times: 9, ..rule(Effect::KillBefore) });
        assert_eq!(state.effect(&call(None, "/thing-1")), None);
        assert_eq!(state.effect(&call(Some("UpdateJob"), "/thing-1")), Some(Effect::KillBefore));
        state.rule.function = Some("Start".into());
        assert_eq!(state.effect(&call(Some("UpdateJob"), "/thing-1")), None);
        state.rule.operation = Some("iot.DescribeThing".into());
        assert_eq!(state.effect(&call(Some("StartWorkflow"), "/thing-1")), Some(Effect::KillBefore));
        state.rule.operation = Some("iot.UpdateThing".into());
        assert_eq!(state.effect(&call(Some("StartWorkflow"), "/thing-1")), None);
    }
}
