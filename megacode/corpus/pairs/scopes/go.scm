[(function_declaration) (method_declaration) (func_literal)] @function
[
  (block) (if_statement) (for_statement) (expression_switch_statement) (type_switch_statement)
  (select_statement) (expression_case) (default_case) (type_case) (communication_case)
] @block

(parameter_declaration type: (_) @outer)
(variadic_parameter_declaration type: (_) @outer)

[(identifier) (type_identifier)] @word
(label_name) @word @label

(function_declaration name: (identifier) @name)
(method_declaration name: (field_identifier) @method)
(type_parameter_declaration name: (identifier) @type)
(parameter_declaration name: (identifier) @var)
(variadic_parameter_declaration name: (identifier) @var)
(short_var_declaration left: (expression_list (identifier) @var))
(short_var_declaration left: (_) @late)
(range_clause left: (expression_list (identifier) @var) ":=")
(range_clause left: (_) @late)
(receive_statement left: (expression_list (identifier) @var) ":=")
(receive_statement left: (_) @late)
(var_spec name: (identifier) @var @late)
(const_spec name: (identifier) @var @late)
(type_switch_statement alias: (expression_list (identifier) @var))
(type_spec name: (type_identifier) @var)
(type_alias name: (type_identifier) @var)

(keyed_element . (literal_element (identifier) @fixed))
(keyed_element key: (literal_element (identifier) @fixed))
(field_declaration !name type: (_) @frozen)
(qualified_type name: (type_identifier) @keep)
