[
  (function_declaration) (function_expression) (generator_function_declaration) (generator_function)
  (arrow_function) (method_definition)
] @function
[
  (class_declaration) (class) (statement_block) (for_statement) (for_in_statement) (catch_clause)
  (switch_body)
] @block

[(identifier) (shorthand_property_identifier) (shorthand_property_identifier_pattern)] @word
[(shorthand_property_identifier) (shorthand_property_identifier_pattern)] @shorthand
(statement_identifier) @word @label

(function_declaration name: (identifier) @name)
(generator_function_declaration name: (identifier) @name)
(method_definition name: (property_identifier) @method)
(function_expression name: (identifier) @var)
(generator_function name: (identifier) @var)
(arrow_function parameter: (identifier) @var)
(catch_clause parameter: (identifier) @var)
(lexical_declaration (variable_declarator name: (identifier) @var))
(variable_declaration (variable_declarator name: (identifier) @hoist))
(for_in_statement kind: ["let" "const"] left: (identifier) @var)
(for_in_statement kind: "var" left: (identifier) @hoist)

(shorthand_property_identifier_pattern) @leaf
(pair_pattern value: (identifier) @leaf)
(array_pattern (identifier) @leaf)
(rest_pattern (identifier) @leaf)
(assignment_pattern left: (identifier) @leaf)

(jsx_opening_element name: (_) @frozen)
(jsx_closing_element name: (_) @frozen)
(jsx_self_closing_element name: (_) @frozen)
(with_statement) @unsafe
