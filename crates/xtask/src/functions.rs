//! The deployed functions, as AWS Lambda describes them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::cloud::Cloud;
use crate::project::Project;

/// The file of a run that holds what [`write_environment`] writes.
const ENVIRONMENT: &str = "functions.env";

/// A deployed function.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Function {
    /// Its full name.
    #[serde(rename = "FunctionName")]
    pub(crate) name: String,
    /// How large its archive is, in bytes.
    pub(crate) code_size: u64,
    #[serde(default)]
    environment: Environment,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Environment {
    variables: BTreeMap<String, String>,
}

impl Function {
    /// Its environment variables.
    pub(crate) fn variables(&self) -> &BTreeMap<String, String> {
        &self.environment.variables
    }
}

/// All functions of the cloud.
pub(crate) fn list(project: &Project, cloud: &Cloud) -> Result<Vec<Function>> {
    let mut list = cloud.tool(project, "aws");
    list.args(["lambda", "list-functions", "--output", "json", "--query", "Functions[]"]);
    let answer =
        project.processes.output("`aws lambda list-functions`", &mut list, &cloud.run.log("list-functions"))?;
    serde_json::from_str(&answer).context("functions have another shape than expected")
}

/// Writes the environment in which any of the functions runs outside the cloud, for `cargo lambda watch`.
pub(crate) fn write_environment(project: &Project, cloud: &Cloud) -> Result<()> {
    let functions = list(project, cloud)?;
    let merged = merged(&functions)?;
    let mut text = String::new();
    merged.iter().try_for_each(|(name, value)| writeln!(text, "{name}={value}"))?;
    let path = cloud.run.file(ENVIRONMENT);
    std::fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))
}

/// The variables of all functions; a name means the same in each.
fn merged(functions: &[Function]) -> Result<BTreeMap<&str, &str>> {
    let mut merged = BTreeMap::<&str, &str>::new();
    for (name, value) in functions.iter().flat_map(Function::variables) {
        if *merged.entry(name).or_insert(value) != value {
            bail!("{name} has different values in two functions: one file cannot serve both");
        }
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str, value: &str) -> Function {
        serde_json::from_value(serde_json::json!({
            "FunctionName": "f", "CodeSize": 1, "Environment": {"Variables": {name: value}},
        }))
        .expect("a function")
    }

    #[test]
    fn one_environment_serves_all_functions() {
        let functions = [function("TABLE", "a"), function("TOPIC", "b"), function("TABLE", "a")];
        assert_eq!(merged(&functions).expect("they agree"), BTreeMap::from([("TABLE", "a"), ("TOPIC", "b")]));
        let error = merged(&[function("TABLE", "a"), function("TABLE", "b")]).expect_err("they do not");
        assert!(error.to_string().contains("TABLE"), "{error}");
        let plain: Function = serde_json::from_str(r#"{"FunctionName": "f", "CodeSize": 1}"#).expect("no environment");
        assert!(plain.variables().is_empty());
    }
}
